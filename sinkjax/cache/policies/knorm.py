"""Keep small keys."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Knorm:
    r"""Minus the length of the key, $-\lVert k_i \rVert_2$, in float32 at least.

    Keys that many queries attend to tend to be short, those of sinks above all. It needs no
    attention, so it goes with any kernel.

    Source: Devoto et al. 2024, arXiv 2406.11430.
    """

    num_queries = 0
    discount = None

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Rotation does not change a length, so keys may be rotated or not."""
        key = evidence.key.astype(jnp.promote_types(evidence.key.dtype, jnp.float32))
        return -jnp.linalg.norm(key, axis=-1)
