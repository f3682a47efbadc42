r"""The exp-sum family: $w_j = e^{z_j} / (e^s + \sum_k e^{z_k})$, z a function of each logit alone.

Shift by the row maximum m, the sink in it: e^(s − m) cannot overflow then, as it does in kernels that
take the maximum over the keys only.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax_kernels.normalizers.description import Family, Normalizer, Rows, expect


@dataclasses.dataclass(frozen=True)
class Softmax(Normalizer, name="softmax"):
    r"""$w_j = e^{x_j} / (e^{s} + \sum_k e^{x_k})$, with the sink logit $s = -\infty$ when there is none.

    Source: Vaswani et al. 2017, eq. 1; the learned sink logit: gpt-oss (OpenAI 2025).
    """

    family: ClassVar[Family] = "exp_sum"
    has_log_sum_exp: ClassVar[bool] = True
    takes_sinks: ClassVar[bool] = True

    @property
    def sums_to_one(self) -> bool:
        """Without sink logits, which take a share of their own."""
        return True

    def weigh(self, rows):
        return exp_sum(rows.logits, rows.where, rows.sinks)


@dataclasses.dataclass(frozen=True)
class Softmax1(Normalizer, name="softmax1"):
    r"""$w_j = e^{x_j} / (1 + \sum_k e^{x_k})$: a head may attend to nothing. A sink logit fixed at 0.

    Source: Miller, "Attention Is Off By One" (2023).
    """

    family: ClassVar[Family] = "exp_sum"
    has_log_sum_exp: ClassVar[bool] = True

    def weigh(self, rows):
        return exp_sum(rows.logits, rows.where, constant_sink(self))


@dataclasses.dataclass(frozen=True)
class SoftmaxN(Normalizer, name="softmax_n"):
    r"""$w_j = e^{x_j} / (n + \sum_k e^{x_k})$: softmax1 with another constant; n = 0 is softmax.

    Source: Murphy, "softmax_n" (flash-attention-softmax-n, 2023).
    """

    n: float = 1.0
    family: ClassVar[Family] = "exp_sum"
    has_log_sum_exp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect(self, "n", self.n >= 0, "a finite number of at least 0")

    @property
    def sums_to_one(self) -> bool:
        return self.n == 0

    def weigh(self, rows):
        return exp_sum(rows.logits, rows.where, constant_sink(self))


@dataclasses.dataclass(frozen=True)
class SigSoftmax(Normalizer, name="sigsoftmax"):
    r"""$w_j = e^{x_j} \sigma(x_j) / \sum_k e^{x_k} \sigma(x_k)$: softmax of $2x - \mathrm{softplus}(x)$.

    Sums to one, so a head that has nothing to attend to still needs a sink; unlike softmax it changes
    when all logits move together. The log-sum-exp is that of the mapped logits.
    Source: Kanai et al. 2018, arXiv 1805.10829; the stable form is ours, $x + \ln \sigma(x)$.
    """

    family: ClassVar[Family] = "exp_sum"
    has_log_sum_exp: ClassVar[bool] = True

    @property
    def sums_to_one(self) -> bool:
        return True

    def weigh(self, rows):
        return exp_sum(exponent(self, rows.seen), rows.where, None)


@dataclasses.dataclass(frozen=True)
class Cog(Normalizer, name="cog"):
    r"""$w_j = \mathrm{sign}(x_j)\, e^{|x_j|} / \sum_k e^{|x_k|}$: weights that may be negative.

    A head may subtract what it reads; the weights' magnitudes sum to one.
    Source: Lv et al. 2024, arXiv 2411.07176 (Cog attention); as in `lucidrains/x-transformers`,
    `attend.py`.
    """

    family: ClassVar[Family] = "exp_sum"
    is_signed: ClassVar[bool] = True

    def weigh(self, rows):
        sizes, _ = exp_sum(exponent(self, rows.seen), rows.where, None)
        return jnp.sign(rows.seen) * sizes, None


def exponent(normalizer: Normalizer, logits: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """z, what an exp-sum normaliser exponentiates in the place of the logit x."""
    match normalizer:
        case SigSoftmax():
            return 2 * logits - jax.nn.softplus(logits)
        case Cog():
            return jnp.abs(logits)
    return logits


def constant_sink(normalizer: Normalizer) -> float | None:
    """The fixed sink logit of an exp-sum normaliser: 0 for softmax1, ln n for softmax_n."""
    match normalizer:
        case Softmax1():
            return 0.0
        case SoftmaxN(n=n) if n > 0:
            return math.log(n)
    return None


def exp_sum(logits, where, sinks) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """softmax over the visible keys and one more entry, the sink, that has no value."""
    # Masked before, not after: exp is 0 at masked keys, and so is its gradient.
    logits = jnp.where(where, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    if sinks is not None:
        sinks = jnp.asarray(sinks, logits.dtype)
        top = jnp.maximum(top, sinks)  # s in the maximum: exp(s - m) cannot overflow
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    terms = jnp.exp(logits - top[..., None])
    total = terms.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    return terms / safe[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(safe))


def softmax(rows: Rows, logits: Float[Array, "*rows S"]) -> Float[Array, "*rows S"]:
    """Softmax of these logits over the visible keys of the rows."""
    return exp_sum(logits, rows.where, None)[0]
