"""The two-pass family: a number of the whole row is needed before the first weight is known.

ssmax counts the visible keys before it scales; the clipped ones and elastic softmax bend the
normalised weights p = softmax(x).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax_kernels.normalizers.description import Family, Normalizer, Rows, expect
from sinkjax_kernels.normalizers.exp_sum import softmax


@dataclasses.dataclass(frozen=True)
class ScalableSoftmax(Normalizer, name="ssmax"):
    r"""$w = \mathrm{softmax}(s \ln(n)\, x)$, n the visible keys of the row: does not fade as n grows.

    `scale` is s, learned per head. Sums to one.
    Source: Nakanishi 2025, arXiv 2501.19399, as others restate it: $n^{s x_j} / \sum_k n^{s x_k}$ with n
    the size of the vector. That n leaves out keys that are masked is our reading, and the only one
    for which a row does not depend on padding.
    """

    scale: float = 1.0
    family: ClassVar[Family] = "two_pass"
    parameters: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        expect(self, "scale", True, "finite")

    @property
    def sums_to_one(self) -> bool:
        return True

    def weigh(self, rows):
        return softmax(rows, rows.constant(self, "scale") * jnp.log(rows.count) * rows.seen), None


@dataclasses.dataclass(frozen=True)
class ClippedSoftmax(Normalizer, name="clipped_softmax"):
    r"""$w_j = \mathrm{clip}((\zeta - \gamma) p_j + \gamma, 0, 1)$, $p = \mathrm{softmax}(x)$.

    Exact zeros at finite logits. `gamma` is the constant γ ≤ 0; or `alpha` makes it
    $\gamma_i = -\alpha / n_i$, n_i the visible keys of the row, as one constant suits one length and
    causal rows have all. One of the two; alpha = 2 when neither is given. No gradient passes where
    it clips, as intended.
    Source: Bondarenko et al. 2023, arXiv 2306.12929: γ = −0.025 for BERT at 128 tokens,
    α between 2 and 4. A γ per row is ours.
    """

    gamma: float | None = None
    alpha: float | None = None
    zeta: float = 1.0
    family: ClassVar[Family] = "two_pass"

    def __post_init__(self) -> None:
        if self.gamma is not None and self.alpha is not None:
            raise ValueError("clipped_softmax: expected gamma or alpha, got both")
        if self.gamma is None and self.alpha is None:
            object.__setattr__(self, "alpha", 2.0)
        expect(self, "zeta", self.zeta >= 1, "at least 1")
        if self.gamma is not None:
            expect(self, "gamma", self.gamma <= 0, "at most 0")
        if self.alpha is not None:
            expect(self, "alpha", self.alpha >= 0, "at least 0")

    def weigh(self, rows):
        gamma = self.gamma if self.alpha is None else -self.alpha / rows.count
        return _clipped(rows, gamma, self.zeta), None


@dataclasses.dataclass(frozen=True)
class NormalizedClippedSoftmax(Normalizer, name="normalized_clipped_softmax"):
    r"""$w_j = c_j / \sum_k c_k$, $c = \mathrm{clip}((1 + \alpha / n) p - \alpha / n, 0, 1)$, n visible keys.

    Clipped softmax whose rows keep their mass whatever the number of keys: exact zeros, sum one, and
    0 for a row that is clipped altogether.
    Source: Liao & Monz 2024, arXiv 2402.12102, who want the normalisation invariant to the length and,
    in causal models, to the number of visible keys. We have not seen their equation: this is our
    reading of what they say of it.
    """

    alpha: float = 2.0
    family: ClassVar[Family] = "two_pass"

    def __post_init__(self) -> None:
        expect(self, "alpha", self.alpha >= 0, "at least 0")

    @property
    def sums_to_one(self) -> bool:
        """Unless all of the row is clipped."""
        return True

    def weigh(self, rows):
        weights = _clipped(rows, -self.alpha / rows.count, 1.0)
        total = weights.sum(-1, keepdims=True)
        return weights / jnp.where(total == 0, 1, total), None


@dataclasses.dataclass(frozen=True)
class ElasticSoftmax(Normalizer, name="elastic_softmax"):
    r"""$w_j = \mathrm{relu}(p_j + \tau / n)$, $p = \mathrm{softmax}(x)$, n the visible keys of the row.

    `offset` is τ, learned per head: at −1 a row that spreads its weight evenly gives none at all.
    The offset is added to visible keys only: above 0 it would leak to the others.
    Source: Lazy Attention, arXiv 2601.00919; n = 1-based index of the query in a causal row and the
    initial −1 as in `Fzkuji/flash-lazy-attention`, `adasplash/lazy_attention.py`. Its distance bias
    is `sinkjax.ops.positions`.
    """

    offset: float = -1.0
    family: ClassVar[Family] = "two_pass"
    parameters: ClassVar[tuple[str, ...]] = ("offset",)

    def __post_init__(self) -> None:
        expect(self, "offset", True, "finite")

    def weigh(self, rows):
        shifted = softmax(rows, rows.logits) + rows.constant(self, "offset") / rows.count
        return rows.masked(jax.nn.relu(shifted)), None


def _clipped(rows: Rows, gamma, zeta: float) -> Float[Array, "*rows S"]:
    """softmax stretched to [γ, ζ] and cut at 0 and 1; masked again, as γ moved the hidden keys."""
    stretched = (zeta - gamma) * softmax(rows, rows.logits) + gamma
    return rows.masked(jnp.clip(stretched, 0, 1))
