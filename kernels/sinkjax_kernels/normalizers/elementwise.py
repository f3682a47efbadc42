r"""The elementwise family: $w_j = f(x_j)$, no key competes with another; and its normalised forms.

Without a sum to fill, no row needs a sink. The normalised forms divide by the sum over the visible
keys, and the sinks come back (Gu et al. 2024, arXiv 2410.10781).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax_kernels.normalizers.description import Family, Normalizer, expect
from sinkjax_kernels.normalizers.exp_sum import softmax

SMALLEST_SUM = 1e-8
"""Added to the sum that a normalised form divides by: `sail-sg/Attention-Sink`,
`lit_gpt/inference/model_attn_kernel_infer.py`."""

LARGEST_EXPONENT = 44.0
"""Half of what float32 can exponentiate: where ConSmax stops growing."""


@dataclasses.dataclass(frozen=True)
class Sigmoid(Normalizer, name="sigmoid"):
    r"""$w_j = \sigma(x_j + b)$: no row is normalised, so no row needs a sink.

    `bias` is the constant b; $-\ln n$ for a context of n keys keeps the initial row mass near one
    (Ramapuram et al. 2024, arXiv 2409.04431, §3). A learned bias per head comes as the parameter
    ``bias`` and is added to the constant. `normalized` divides by the row's sum, computed as
    softmax(ln σ(x + b)), which cannot underflow (Gu et al. 2024, arXiv 2410.10781).
    """

    bias: float = 0.0
    normalized: bool = False
    family: ClassVar[Family] = "elementwise"
    parameters: ClassVar[tuple[str, ...]] = ("bias",)

    def __post_init__(self) -> None:
        expect(self, "bias", True, "finite")

    @property
    def sums_to_one(self) -> bool:
        return self.normalized

    def weigh(self, rows):
        logits = rows.seen + rows.constant(self, "bias")
        if self.normalized:
            return softmax(rows, jax.nn.log_sigmoid(logits)), None
        return rows.masked(jax.nn.sigmoid(logits)), None


@dataclasses.dataclass(frozen=True)
class Relu(Normalizer, name="relu"):
    r"""$w_j = \mathrm{relu}(x_j) / d$: exact zeros, and no sum to fill.

    `divisor` is d; `by_length` divides by the number of visible keys too (Wortsman et al. 2023,
    arXiv 2309.08586: $\mathrm{relu}(x)/n$ comes closest to softmax); `normalized` by the row's sum.
    Source: the plain form with a constant d is ReLUMax in `ReaLLMASIC/nanoGPT`; Guo et al. 2024
    (arXiv 2410.13835) train it without sinks.
    """

    normalized: bool = False
    by_length: bool = False
    divisor: float = 1.0
    family: ClassVar[Family] = "elementwise"

    def __post_init__(self) -> None:
        expect(self, "divisor", self.divisor > 0, "above 0")
        if self.normalized and self.by_length:
            raise ValueError("relu: expected normalized or by_length, got both")

    @property
    def sums_to_one(self) -> bool:
        return self.normalized

    def weigh(self, rows):
        weights = rows.masked(jax.nn.relu(rows.seen)) / self.divisor
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdims=True) + SMALLEST_SUM)
        return (weights / rows.count if self.by_length else weights), None


@dataclasses.dataclass(frozen=True)
class Elu(Normalizer, name="elu"):
    r"""$w_j = \phi(q) \cdot \phi(k_j)$ with $\phi(x) = \mathrm{elu}(x) + 1 > 0$: a linear-attention kernel.

    The feature map is no function of the logit: `sinkjax.ops` applies `feature_map` to query and key
    (after RoPE, as the source does), and what `weigh` gets are the products. `normalized` divides by
    the row's sum.
    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7; Gu et al. 2024, arXiv 2410.10781, and
    `sail-sg/Attention-Sink`, `lit_gpt/inference/model_attn_kernel_infer.py`.
    """

    normalized: bool = False
    family: ClassVar[Family] = "elementwise"

    @property
    def sums_to_one(self) -> bool:
        return self.normalized

    def weigh(self, rows):
        weights = rows.seen
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdims=True) + SMALLEST_SUM)
        return rows.masked(weights), None


@dataclasses.dataclass(frozen=True)
class Identity(Normalizer, name="identity"):
    r"""$w_j = x_j$: linear attention without a kernel; weights may be negative.

    `normalized` divides by $\max(1, |\sum_k x_k|)$, so that rows whose sum is small stay as they are.
    Source: Gu et al. 2024, arXiv 2410.10781; the denominator from `sail-sg/Attention-Sink`,
    `lit_gpt/inference/model_attn_kernel_infer.py`.
    """

    normalized: bool = False
    family: ClassVar[Family] = "elementwise"
    is_signed: ClassVar[bool] = True

    def weigh(self, rows):
        weights = rows.seen
        if self.normalized:
            weights = weights / jnp.maximum(jnp.abs(weights.sum(-1, keepdims=True)), 1)
        return weights, None


@dataclasses.dataclass(frozen=True)
class ConSmax(Normalizer, name="consmax"):
    r"""$w_j = e^{x_j - \beta} / \gamma$: softmax with two learned constants instead of maximum and sum.

    `shift` is β and `divisor` γ, both learned per head. There are no row statistics, so the
    published form overflows where $x - \beta$ passes 88; here it stops growing at 44.
    Source: Liu et al. 2024, arXiv 2402.10930; the initial 2.5 and 100 from `ReaLLMASIC/nanoGPT`.
    """

    shift: float = 2.5
    divisor: float = 100.0
    family: ClassVar[Family] = "elementwise"
    parameters: ClassVar[tuple[str, ...]] = ("shift", "divisor")

    def __post_init__(self) -> None:
        expect(self, "shift", True, "finite")
        expect(self, "divisor", self.divisor > 0, "above 0")

    def weigh(self, rows):
        exponent = jnp.minimum(rows.seen - rows.constant(self, "shift"), LARGEST_EXPONENT)
        return rows.masked(jnp.exp(exponent) / rows.constant(self, "divisor")), None


def feature_map(normalizer: Normalizer, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """What a normaliser does to queries and keys before their product: elu + 1, or nothing."""
    if not isinstance(normalizer, Elu):
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (jax.nn.elu(wide) + 1).astype(x.dtype)
