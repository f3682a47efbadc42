"""Keep whatever the dice say: the baseline that a score has to beat."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from sinkjax.cache.policies.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class Random:
    """A number in [0, 1) made of position, key head and seed alone.

    So the same token has the same score at every step, in every row and however the text was cut
    into chunks; a token once evicted is one that would be evicted again.

    Args:
        seed: layers share it, unless each is given its own.

    Source: the mixing function is the "lowbias32" hash of Chris Wellons' hash-prospector.
    """

    seed: int = 0
    num_queries = 0
    discount = None

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """The upper 24 bits of the hash: as many as float32 holds."""
        heads = jnp.arange(evidence.positions.shape[1], dtype=jnp.uint32)[:, None]
        state = _mix(jnp.uint32(self.seed % 2**32) + jnp.uint32(0x9E3779B9))
        state = _mix(state ^ heads)
        state = _mix(state ^ evidence.positions.astype(jnp.uint32))
        return (state >> 8).astype(jnp.float32) / 2**24


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of the 32-bit integers in which every input bit flips about half of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
