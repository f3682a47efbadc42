"""The rectified family: logits below 0 get a weight of exactly 0, whatever the others are.

e^x − 1 is computed with m = max(0, max x): the published kernels shift by the row maximum alone and
overflow below −88. Keys that are not visible stay out of every sum: |e^−inf − 1| is 1, not 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax_kernels.normalizers.description import Family, Normalizer, Rows, expect
from sinkjax_kernels.normalizers.exp_sum import exp_sum


@dataclasses.dataclass(frozen=True)
class Softpick(Normalizer, name="softpick"):
    r"""$w_j = \mathrm{relu}(e^{x_j} - 1) / (\sum_k |e^{x_k} - 1| + \epsilon)$: sparse, at most one.

    Computed with $m = \max(0, \max_k x_k)$; the published kernels shift by the row maximum alone and
    overflow below -88, and add their epsilon in the shifted scale. Here epsilon is unshifted.
    Source: Zuhri et al. 2025, arXiv 2504.20966, eq. 4.
    """

    epsilon: float = 1e-8
    family: ClassVar[Family] = "rectified"

    def __post_init__(self) -> None:
        expect(self, "epsilon", self.epsilon >= 0, "at least 0")

    def weigh(self, rows):
        return _excess_share(rows, rows.seen, self.epsilon, jnp.abs), None


@dataclasses.dataclass(frozen=True)
class RectifiedOnly(Normalizer, name="rectified_only"):
    r"""$w_j = [x_j \ge 0]\, e^{x_j} / \sum_{k: x_k \ge 0} e^{x_k}$: softmax over the keys at or above 0.

    A row whose logits are all negative gives 0, any other sums to one, and its sink stays: 33 % at
    ε = 0.2 against 48 % for softmax in the ablation of softpick.
    Source: Zuhri et al. 2025, arXiv 2504.20966v4, table 3. Which formula its row "rectified-only"
    has is our reading: of the layers in `zaydzuhri/flash-linear-attention` as many as the table has
    rows are compared there, and the one named `rectified` is this.
    """

    family: ClassVar[Family] = "rectified"

    @property
    def sums_to_one(self) -> bool:
        """Unless all logits are negative."""
        return True

    def weigh(self, rows):
        return exp_sum(rows.logits, rows.where & (rows.logits >= 0), None)[0], None


@dataclasses.dataclass(frozen=True)
class ReluSoftmax(Normalizer, name="relu_softmax"):
    r"""$w_j = \mathrm{relu}(e^{x_j} - 1) / (\sum_k \mathrm{relu}(e^{x_k} - 1) + \epsilon)$.

    Softpick without the absolute value in the denominator: negative logits neither count nor learn.
    Source: Zuhri et al. 2025, arXiv 2504.20966v4, table 3, "ReLU softmax"; the formula is
    `relu_softpick_1` of `zaydzuhri/flash-linear-attention`, and that the two are one is our reading.
    """

    epsilon: float = 1e-8
    family: ClassVar[Family] = "rectified"

    def __post_init__(self) -> None:
        expect(self, "epsilon", self.epsilon >= 0, "at least 0")

    @property
    def sums_to_one(self) -> bool:
        """Up to epsilon, unless no logit is positive."""
        return True

    def weigh(self, rows):
        return _excess_share(rows, rows.seen, self.epsilon, jax.nn.relu), None


@dataclasses.dataclass(frozen=True)
class ScaledSoftpick(Normalizer, name="scaled_softpick"):
    r"""Softpick of $s \ln(n + 1)\, x_j$, n the visible keys of the row: sharper in longer contexts.

    `scale` is s, learned per head. With $\ln(n + 1)$ a row of one key is not stuck at 0.
    Source: Zuhri et al. 2025, arXiv 2504.20966v4, table 3. Factor and initial 0.3 as in the layer
    of `zaydzuhri/flash-linear-attention` (there n is the query's place in a causal row); the form
    $s \ln n$ is Nakanishi 2025, arXiv 2501.19399.
    """

    scale: float = 0.3
    epsilon: float = 1e-8
    family: ClassVar[Family] = "two_pass"
    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        expect(self, "scale", True, "finite")
        expect(self, "epsilon", self.epsilon >= 0, "at least 0")

    def weigh(self, rows):
        logits = rows.constant(self, "scale") * jnp.log(rows.count + 1) * rows.seen
        return _excess_share(rows, logits, self.epsilon, jnp.abs), None


def signed_excess(logits: Float[Array, "*any"], top: Array) -> Float[Array, "*any"]:
    """(e^x − 1) e^−m for m ≥ max(0, x), with neither overflow nor cancellation near x = 0."""
    magnitude = -jnp.expm1(-jnp.abs(logits))
    return jnp.sign(logits) * jnp.exp(jnp.maximum(logits, 0) - top) * magnitude


def _excess_share(rows: Rows, logits, epsilon: float, size) -> Float[Array, "*rows S"]:
    """relu(e^x − 1) over the sum of `size` of e^x − 1, of logits that are 0 where not visible."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, where=rows.where, initial=0.0))
    excess = signed_excess(logits, top[..., None])  # 0 at masked keys
    total = size(excess).sum(axis=-1) + epsilon * jnp.exp(-top)
    safe = jnp.where(total == 0, 1, total)
    return jax.nn.relu(excess) / safe[..., None]
