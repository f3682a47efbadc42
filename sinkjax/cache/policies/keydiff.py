"""Keep keys that point elsewhere than most."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence

# As torch's `normalize` and `cosine_similarity`, which the peers call.
_LEAST_NORM = 1e-12
_LEAST_PRODUCT = 1e-8


@dataclasses.dataclass(frozen=True)
class KeyDiff:
    r"""Minus the cosine between a key and the mean direction of all keys held.

    $-\cos(k_i, \bar k)$ with $\bar k = \mathrm{mean}_j \, k_j / \lVert k_j \rVert$. It needs no
    attention; a sink's key points away from the others and stays.

    Source: Park et al. 2025, arXiv 2504.15364; the paper evicts block by block.
    """

    num_queries = 0
    discount = None

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Empty slots have no part in the mean."""
        key = evidence.key.astype(jnp.promote_types(evidence.key.dtype, jnp.float32))
        key = jnp.where(evidence.held[..., None], key, 0)
        norm = jnp.linalg.norm(key, axis=-1, keepdims=True)
        count = jnp.maximum(evidence.held.sum(-1), 1)[..., None]
        mean = (key / jnp.maximum(norm, _LEAST_NORM)).sum(-2) / count
        product = jnp.einsum("BKSH,BKH->BKS", key, mean)
        size = jnp.maximum(norm[..., 0], _LEAST_PRODUCT)
        return -product / (
            size * jnp.maximum(jnp.linalg.norm(mean, axis=-1), _LEAST_PRODUCT)[..., None]
        )
