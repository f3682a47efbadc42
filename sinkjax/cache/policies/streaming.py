"""Keep what is recent."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence


@dataclasses.dataclass(frozen=True)
class StreamingLLM:
    """The score is the position: with its sink tokens protected, a window behind them.

    Counted back from the end of the text, i − t, so that float32 tells neighbours apart at any
    length of a stream.

    Source: Xiao et al. 2023, arXiv 2309.17453, §3.2. kvpress scores the same tokens 1 and the others 0.
    """

    num_queries = 0
    discount = None

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Minus the age."""
        return (evidence.positions - evidence.time[:, None, None]).astype(jnp.float32)
