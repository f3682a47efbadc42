"""Which slot a position lives in, and who is written when a chunk brings more than the ring holds.

All of it is computed from positions: an empty slot is −1, padding is −1, and a position that
cannot be served (past `LIMIT` or past a `Full` cache) is *refused*: its token gives NaN and is not
written.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sinkjax.cache.store import Layout

LIMIT = 2**31 - 1
"""First position that a stream refuses: the clock after it would not fit int32."""

REFUSED = -2
"""What `Cache.next_positions` gives instead of a position past the limit."""


class Pinned(NamedTuple):
    """Of a layout with pins: positions `[B, C]` per slot, and `[B, P]` of the pins, −1 for none."""

    positions: Any
    pins: Any


def refused(limit: int | None, positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Tokens that a layer with this limit cannot serve."""
    out = (positions < -1) | (positions >= LIMIT)
    return out if limit is None else out | (positions >= limit)


def served(limit: int | None, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions with every refused token turned into padding."""
    return jnp.where(refused(limit, positions), -1, positions)


def sinks(
    layout: Layout, positions: Int[Array, "B T"], pins: Int[Array, "B P"] | None
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Tokens of a chunk that go to a sink slot at once, and that slot."""
    if pins is None:
        return (positions >= 0) & (positions < layout.sink_slots), positions
    same = (positions[..., None] == pins[:, None]) & (pins[:, None] >= 0)
    is_sink = same.any(-1)
    if layout.pins_at_once is not None:
        is_sink &= positions < layout.pins_at_once
    return is_sink, same.argmax(-1).astype(positions.dtype)


def late_pins(
    layout: Layout, positions: Int[Array, "B T"], pins: Int[Array, "B P"]
) -> tuple[Bool[Array, "B P"], Int[Array, "B P"]]:
    """Pins that come in this chunk and go to the ring first, and which token of it each is."""
    if layout.pins_at_once is None:
        return jnp.zeros(pins.shape, bool), jnp.zeros_like(pins)
    same = (positions[:, None] == pins[..., None]) & (pins[..., None] >= layout.pins_at_once)
    return same.any(-1), same.argmax(-1)


def slots(
    layout: Layout, positions: Int[Array, "B T"], pins: Int[Array, "B P"] | None = None
) -> Int[Array, "B T"]:
    """The slot that each token of a chunk is written to, unique within a row.

    A token that is not written (padding, refused, or evicted again by a later token of its own
    chunk) gets an index past the end, a different one for each, so that the scatter may
    promise unique indices and drops them: the result does not depend on the order of writes.
    """
    P, W = layout.sink_slots, layout.ring_slots
    positions = served(layout.limit, positions)
    newest = positions.max(axis=1, keepdims=True)
    is_sink, sink_slot = sinks(layout, positions, pins)
    written = (positions >= 0) & (is_sink | (newest - positions < W))
    slot = jnp.where(is_sink, sink_slot, P + (positions - P) % W)
    outside = P + W + jnp.arange(positions.shape[1], dtype=positions.dtype)
    return jnp.where(written, slot, outside)


def record(layout: Layout, held: Any, positions: Int[Array, "B T"]) -> Any:
    """The shared positions of a layout after a chunk."""
    old, pins = held if isinstance(held, Pinned) else (held, None)
    positions = served(layout.limit, positions)
    new = write(old, slots(layout, positions, pins), positions)
    return new if pins is None else Pinned(with_late_pins(layout, new, positions, pins), pins)


def with_late_pins(
    layout: Layout,
    held: Int[Array, "B C"],
    positions: Int[Array, "B T"],
    pins: Int[Array, "B P"] | None,
) -> Int[Array, "B C"]:
    """Positions per slot, those of the `late_pins` of a chunk among them."""
    if pins is None:
        return held
    come, _ = late_pins(layout, positions, pins)
    first = held[:, : layout.sink_slots]
    return held.at[:, : layout.sink_slots].set(jnp.where(come, pins, first))


def write(
    leaf: Array, slot: Int[Array, "B T"], new: Array, *, where: Bool[Array, "B T"] | None = None
) -> Array:
    """`leaf[b, ..., slot[b, t], ...] = new[b, t]` for leaves `[B, K, C, H]`, `[B, N, C]` or `[B, C]`."""
    if where is not None:
        capacity = leaf.shape[-1] if leaf.ndim == 2 else leaf.shape[2]
        slot = jnp.where(where, slot, capacity + jnp.arange(slot.shape[1], dtype=slot.dtype))

    # Row by row, which a compiler sees: indices of rows as data would move between devices.
    @jax.vmap
    def put(leaf, slot, new):
        at = leaf.at[slot] if leaf.ndim == 1 else leaf.at[:, slot]
        new = new if leaf.ndim == 1 else new.swapaxes(0, 1)
        return at.set(new, mode="drop", unique_indices=True)

    return put(leaf, slot, new.astype(leaf.dtype))
