"""Keep what has drawn attention so far."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence, required_mass


@dataclasses.dataclass(frozen=True)
class H2O:
    r"""Accumulated attention mass, $\sum_t \gamma^{T-t} a_t(i)$, mean over the group's query heads.

    Early tokens were seen by more queries, so sinks stay by their score. H2O itself keeps half of its
    budget for the last tokens: protect a window of that size. With γ < 1 the past is forgotten, and
    the head start of early tokens with it (A2SF).

    Args:
        discount: γ, above 0 and at most 1.

    Source: Zhang et al. 2023, arXiv 2306.14048, algorithm 1; A2SF: Jo & Shin 2024, arXiv 2407.20485.
    """

    discount: float = 1.0
    num_queries = 0

    def __post_init__(self) -> None:
        _check_discount(self)

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """The mass."""
        return required_mass(evidence, "H2O")


@dataclasses.dataclass(frozen=True)
class ObservedAttention:
    r"""Mean attention per query that could see the token, $\sum_t a_t(i) / (T - i)$.

    With γ < 1 queries count the less the older they are, in the sum and in the number alike:
    $\sum_t \gamma^{T-1-t} a_t(i) / \sum_{n < T-i} \gamma^n$. Why: without the head start that H2O gives
    to early tokens; a token that just came is measured by its own query alone, so protect a window.

    Args:
        discount: γ, above 0 and at most 1.

    Source: kvpress, observed_attention_press.py (γ = 1).
    """

    discount: float = 1.0
    num_queries = 0

    def __post_init__(self) -> None:
        _check_discount(self)

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Mass over the number of queries."""
        mass = required_mass(evidence, "ObservedAttention")
        age = evidence.time[:, None, None] - evidence.positions
        seen_by = jnp.maximum(age, 1).astype(mass.dtype)
        if self.discount < 1:
            seen_by = -jnp.expm1(seen_by * math.log(self.discount)) / (1 - self.discount)
        return mass / seen_by


@dataclasses.dataclass(frozen=True)
class VATP:
    r"""Accumulated attention mass times the size of what it fetches, $\lVert v_i \rVert_1$.

    A sink has a large mass and a small value, so this score throws it away: protect the sink tokens
    (20 in the paper).

    Args:
        discount: γ of the mass, above 0 and at most 1.

    Source: Guo et al. 2024, arXiv 2406.12335.
    """

    discount: float = 1.0
    num_queries = 0

    def __post_init__(self) -> None:
        _check_discount(self)

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Mass times the L1 norm of the value."""
        mass = required_mass(evidence, "VATP")
        return mass * jnp.abs(evidence.value.astype(mass.dtype)).sum(-1)


def _check_discount(policy: H2O | ObservedAttention | VATP) -> None:
    if not 0 < policy.discount <= 1:
        name = type(policy).__name__
        raise ValueError(
            f"{name}.discount: expected a number above 0 and at most 1, got {policy.discount}"
        )
