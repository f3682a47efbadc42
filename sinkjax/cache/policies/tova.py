"""Keep what the last query looks at."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence, last_weights


@dataclasses.dataclass(frozen=True)
class TOVA:
    """Attention of the last query, a mean over all query heads: one set of tokens for all heads.

    kvpress never evicts the last token; here that is a protected window of 1.

    The mean is per slot, so every head must hold the same tokens in the same slots, as they do when
    nothing but this policy has evicted them.

    Source: Oren et al. 2024, arXiv 2401.06104.
    """

    num_queries = 1
    discount = None

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """The same for all key heads."""
        if evidence.queries is not None and evidence.query_positions is not None:
            evidence = dataclasses.replace(
                evidence,
                queries=evidence.queries[:, -1:],
                query_positions=evidence.query_positions[:, -1:],
            )
        weights = last_weights(evidence, "TOVA").mean((1, 2, 3))
        return jnp.broadcast_to(weights[:, None], evidence.positions.shape)
