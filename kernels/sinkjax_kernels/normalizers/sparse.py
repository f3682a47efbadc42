r"""The sparse family: $w_j = [(\alpha - 1) x_j - \tau]_+^{1/(\alpha - 1)}$, τ such that the sum is one.

Exact zeros, but the sum is still one: what a key loses goes to another, so a sink may stay.
"""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels.normalizers.description import Family, Normalizer, expect


@dataclasses.dataclass(frozen=True)
class Sparsemax(Normalizer, name="sparsemax"):
    r"""$w_j = [x_j - \tau]_+$ with $\sum_j w_j = 1$: the Euclidean projection on the simplex; α = 2.

    Source: Martins & Astudillo 2016, arXiv 1602.02068.
    """

    family: ClassVar[Family] = "sparse"

    @property
    def sums_to_one(self) -> bool:
        return True

    def weigh(self, rows):
        return entmax(2.0, rows.logits, rows.where), None


@dataclasses.dataclass(frozen=True)
class Entmax15(Normalizer, name="entmax15"):
    r"""$w_j = [x_j / 2 - \tau]_+^2$ with $\sum_j w_j = 1$: between softmax and sparsemax; α = 1.5.

    Source: Peters et al. 2019, arXiv 1905.05702.
    """

    family: ClassVar[Family] = "sparse"

    @property
    def sums_to_one(self) -> bool:
        return True

    def weigh(self, rows):
        return entmax(1.5, rows.logits, rows.where), None


@dataclasses.dataclass(frozen=True)
class Entmax(Normalizer, name="entmax"):
    r"""$w_j = [(\alpha - 1) x_j - \tau]_+^{1/(\alpha - 1)}$ with $\sum_j w_j = 1$, for 1 < α ≤ 2.

    Above 2 the slope at the edge of the support is infinite.
    Source: Peters et al. 2019, arXiv 1905.05702.
    """

    alpha: float = 1.5
    family: ClassVar[Family] = "sparse"

    def __post_init__(self) -> None:
        expect(self, "alpha", 1 < self.alpha <= 2, "above 1 (softmax) and at most 2 (sparsemax)")

    @property
    def sums_to_one(self) -> bool:
        return True

    def weigh(self, rows):
        return entmax(self.alpha, rows.logits, rows.where), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def entmax(
    alpha: float, logits: Float[Array, "*rows S"], where: Bool[Array, "*rows S"]
) -> Float[Array, "*rows S"]:
    """α-entmax of the visible keys; 0 for a row that sees none.

    τ by bisection to the last bit: with the logits shifted so that the largest is 0 it lies in
    [−1, −n^(1 − α)]. The sum of what remains is divided out.
    Source: Blondel et al. 2020 (arXiv 1901.02324).
    """
    power = 1 / (alpha - 1)
    top = jnp.max(logits, axis=-1, where=where, initial=-jnp.inf, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    scaled = jnp.where(where, (alpha - 1) * (logits - top), -jnp.inf)
    count = jnp.maximum(where.sum(axis=-1, keepdims=True), 1).astype(logits.dtype)

    def share(threshold):
        positive = jnp.maximum(scaled - threshold, 0)
        return positive if power == 1 else jnp.square(positive) if power == 2 else positive**power

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        too_low = share(middle).sum(axis=-1, keepdims=True) >= 1
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    bits = jnp.finfo(logits.dtype).nmant + 12
    low = jnp.full_like(top, -1)
    low, _ = jax.lax.fori_loop(0, bits, halve, (low, -(count ** (1 - alpha))))
    weights = share(low)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def _forward(alpha, logits, where):
    weights = entmax(alpha, logits, where)
    return weights, (weights, where)


def _backward(alpha, residuals, d_weights):
    """dX = g dY − q g on the support, g = Y^(2 − α), q = Σ g dY / Σ g (implicit differentiation)."""
    weights, _ = residuals
    support = weights > 0
    slope = jnp.where(support, jnp.where(support, weights, 1) ** (2 - alpha), 0)
    total = slope.sum(axis=-1, keepdims=True)
    weighted = slope * d_weights
    mean = weighted.sum(axis=-1, keepdims=True) / jnp.where(total == 0, 1, total)
    return weighted - mean * slope, None


entmax.defvjp(_forward, _backward)
