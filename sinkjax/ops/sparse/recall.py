"""How much of the attention a selection keeps."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.ops.attention import dot_product_attention
from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.sparse.attention import sparse_attention
from sinkjax.ops.sparse.selection import Selection


def recall(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    selection: Selection,
    *,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B N"]:
    r"""$\frac1T \sum_t \sum_{j \in \mathcal S_t} p_{tj}$ with p the dense causal softmax.

    The share of attention mass that falls on the chosen pairs, per row and head; 1 loses nothing.
    Each query's share is $e^{\mathrm{lse}_{\mathcal S} - \mathrm{lse}}$, two log-sum-exps, so nothing
    of size [T, S] is made. Sink logits are left out: they are no keys.

    Args:
        query, key, query_positions, key_positions, scale, logits_soft_cap: as in `select`.
        selection: what was chosen for them.

    Returns:
        the mean over the queries that are no padding; 0 for a row without one.

    Source: the criterion of the pattern search of Jiang et al. 2024, arXiv 2407.02490, §3.2.
    """
    B, T, _, _ = query.shape
    S = key.shape[2]
    query, key = at_least_float32(query), at_least_float32(key)
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32), (B, T))
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    if key_positions is not None:
        slots = jnp.where(key_positions >= 0, slots, -1)
    value = key[..., :1]  # nobody reads the output
    results: Any = sparse_attention(
        query,
        key,
        value,
        selection,
        query_positions=query_positions,
        key_positions=slots,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        return_residual=True,
    )
    dense_results: Any = dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        is_causal=True,
        query_positions=query_positions,
        key_positions=slots,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        return_residual=True,
    )
    chosen, dense = results[1], dense_results[1]
    seen = jnp.isfinite(dense) & (query_positions >= 0)[..., None]
    share = jnp.where(seen, jnp.exp(chosen - jnp.where(seen, dense, 0)), 0)
    return share.sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)
