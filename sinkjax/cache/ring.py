"""Which slot a position lives in, and who is written when a chunk brings more than the ring holds.

All of it is computed from positions: an empty slot is −1, padding is −1, and a position that
cannot be served (past `LIMIT` or past a `Full` cache) is *refused*: its token gives NaN and is not
written.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sinkjax.cache.descriptions import LayerPlan

LIMIT = 2**31 - 1
"""First position that a stream refuses: the clock after it would not fit int32."""

REFUSED = -2
"""What `Cache.next_positions` gives instead of a position past the limit."""


def refused(plan: LayerPlan, positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Tokens that this layer cannot serve."""
    out = (positions < -1) | (positions >= LIMIT)
    return out if plan.limit is None else out | (positions >= plan.limit)


def served(plan: LayerPlan, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions with every refused token turned into padding."""
    return jnp.where(refused(plan, positions), -1, positions)


def slots(plan: LayerPlan, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The slot that each token of a chunk is written to, unique within a row.

    A token that is not written (padding, refused, or evicted again by a later token of its own
    chunk) gets an index past the end, a different one for each, so that the scatter may
    promise unique indices and drops them: the result does not depend on the order of writes.
    """
    P, W = plan.sink_slots, plan.ring_slots
    positions = served(plan, positions)
    newest = positions.max(axis=1, keepdims=True)
    written = (positions >= 0) & ((positions < P) | (newest - positions < W))
    slot = jnp.where(positions < P, positions, P + (positions - P) % W)
    outside = P + W + jnp.arange(positions.shape[1], dtype=positions.dtype)
    return jnp.where(written, slot, outside)


def write(
    leaf: Array, slot: Int[Array, "B T"], new: Array, *, where: Bool[Array, "B T"] | None = None
) -> Array:
    """`leaf[b, ..., slot[b, t], ...] = new[b, t]` for leaves `[B, K, C, H]`, `[B, N, C]` or `[B, C]`."""
    if where is not None:
        capacity = leaf.shape[-1] if leaf.ndim == 2 else leaf.shape[2]
        slot = jnp.where(where, slot, capacity + jnp.arange(slot.shape[1], dtype=slot.dtype))
    rows = jnp.arange(slot.shape[0])[:, None]
    at = leaf.at[rows, slot] if leaf.ndim == 2 else leaf.at[rows, :, slot]
    return at.set(new.astype(leaf.dtype), mode="drop", unique_indices=True)
