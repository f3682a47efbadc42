"""The ring: sink slots, then slots that are overwritten in turn; also every token of a short text."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sinkjax.cache import ring
from sinkjax.cache.store import Attended, Chunk, Finish, LayerSpec, LayerView, Layout, Pool
from sinkjax.ops.rope import rotate


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "value", "decay"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LayerState:
    """Keys, rotated at their true positions, and values of one layer: `[B, K, C, H]` each.

    A layer with a forget gate also has `decay` `[B, N, C]`: the log gates from the token of a slot
    to the last one, at most 0. Counted from the end, it never outgrows its float.
    """

    key: Any
    value: Any
    decay: Any = None


@dataclasses.dataclass(frozen=True)
class Ring:
    """Layout and mask of one layer's ring; a `Store`.

    Args:
        sink_slots, ring_slots: their sum is the layer's capacity; see `Layout`.
        window, num_sink_tokens: the mask as in `ops.decode_attention`; None is unbounded.
        position_cap: the largest position at which a query meets the sink slots; None: its own.
        limit: first position that does not fit (`Full`), or None.
        pinned: whether the sink slots hold pinned tokens instead of the first ones, see `SinkWindow`.
    """

    sink_slots: int
    ring_slots: int
    window: int | None
    num_sink_tokens: int
    position_cap: int | None
    limit: int | None
    pinned: bool = False

    @property
    def capacity(self) -> int:
        return self.sink_slots + self.ring_slots

    @property
    def layouts(self) -> tuple[Layout, ...]:
        if not self.pinned:
            return (Layout(self.sink_slots, self.ring_slots, self.limit),)
        at_once = None if self.position_cap is None else self.sink_slots
        return (Layout(self.sink_slots, self.ring_slots, self.limit, True, at_once),)

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> LayerState:
        # Two arrays: a step that donates the cache may not be given one buffer twice.
        shape = (batch_size, spec.num_kv_heads, self.capacity, spec.head_dim)
        decay = None
        if spec.num_forget_heads > 0:
            wide = jnp.promote_types(dtype, jnp.float32)
            decay = jnp.zeros((batch_size, spec.num_forget_heads, self.capacity), wide)
        return LayerState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), decay)

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        (layout,), (held,), state = self.layouts, view.positions, view.state
        held, pins = held if isinstance(held, ring.Pinned) else (held, None)
        index = ring.slots(layout, chunk.positions, pins)
        faded = chunk.faded

        def pool(key, value, positions, **more) -> Pool:
            if pins is not None:
                positions, more["sink_positions"] = self.shown(layout, positions)
            return Pool(
                key,
                value,
                positions,
                sink_slots=self.sink_slots,
                num_sink_tokens=self.num_sink_tokens,
                window=self.window,
                **more,
            )

        def write(old: LayerState, key, value, *, where=None) -> LayerState:
            return LayerState(
                old.key if key is None else ring.write(old.key, index, key, where=where),
                old.value if value is None else ring.write(old.value, index, value, where=where),
                None if faded is None else ring.write(old.decay, index, -faded, where=where),
            )

        def with_late_pins(new: LayerState) -> LayerState:
            if pins is None or layout.pins_at_once is None:
                return new
            come, at = ring.late_pins(layout, chunk.positions, pins)
            slot = jnp.broadcast_to(jnp.arange(self.sink_slots, dtype=pins.dtype), pins.shape)

            def put(leaf, tokens):
                where = come[:, None, :, None] if leaf.ndim == 4 else come[:, None]
                first = leaf[:, :, : self.sink_slots]
                new = jnp.where(where, tokens.swapaxes(1, 2).astype(leaf.dtype), first)
                # A slice, no scatter: a step compiled for TPU updates it in place.
                return jax.lax.dynamic_update_slice_in_dim(leaf, new, 0, axis=2)

            key, value = (jnp.take_along_axis(x, at[..., None, None], 1) for x in chunk[:2])
            if chunk.rope is not None:
                key = rotate(key, jnp.where(come, slot - pins, 0), chunk.rope)
            decay = None
            if faded is not None:
                decay = put(new.decay, -jnp.take_along_axis(faded, at[..., None], 1))
            return LayerState(put(new.key, key), put(new.value, value), decay)

        def aged(new: LayerState) -> LayerState:
            if faded is None:
                return new
            return dataclasses.replace(new, decay=new.decay + faded[:, -1, :, None])

        if chunk.positions.shape[1] == 1:
            # The one slot it overwrites holds token t − W, which it no longer sees.
            new = write(state, None, None)
            positions = ring.write(held, index, chunk.positions)

            def placed(attended: Attended) -> LayerState:
                after = dataclasses.replace(new, key=attended.key, value=attended.value)
                return aged(with_late_pins(after))

            return pool(
                state.key, state.value, positions, decay=new.decay, slot=index[:, 0]
            ), placed

        # Sink tokens of the chunk go to their slots first, where the sink query meets them: whatever
        # comes later than the query is hidden by position. The ring must not be written before all
        # of the chunk has seen it.
        is_sink, _ = ring.sinks(layout, chunk.positions, pins)
        first = with_late_pins(write(state, chunk.key, chunk.value, where=is_sink))
        positions = ring.with_late_pins(
            layout,
            ring.write(held, index, chunk.positions, where=is_sink),
            chunk.positions,
            pins,
        )
        rest = jnp.where(is_sink, -1, chunk.positions)
        decay = None
        if faded is not None:
            decay = jnp.concatenate([first.decay, -faded.swapaxes(1, 2)], axis=2)

        def written(_: Attended) -> LayerState:
            others = (chunk.positions >= 0) & ~is_sink
            return aged(write(first, chunk.key, chunk.value, where=others))

        return pool(
            jnp.concatenate([first.key, chunk.key.swapaxes(1, 2)], axis=2),
            jnp.concatenate([first.value, chunk.value.swapaxes(1, 2)], axis=2),
            jnp.concatenate([positions, rest], axis=1),
            decay=decay,
        ), written

    def shown(self, layout: Layout, positions):
        """From which position on each slot is seen, and where distances count the sink slots.

        A late pin is seen in its slot j once it has left the ring, and is stored rotated at j.
        """
        first, W = positions[:, : self.sink_slots], self.ring_slots
        if layout.pins_at_once is None:
            return positions, None
        is_late = first >= layout.pins_at_once
        after = jnp.minimum(first, ring.LIMIT - W) + W
        shown = positions.at[:, : self.sink_slots].set(jnp.where(is_late, after, first))
        return shown, jnp.where(is_late, jnp.arange(self.sink_slots), first)


@dataclasses.dataclass(frozen=True)
class WholeText:
    """What stores have in common that hold every token of a text and look at a part of it."""

    length: int

    @property
    def ring(self) -> Ring:
        """Where the tokens are: slot p holds position p."""
        return Ring(0, self.length, None, 0, None, self.length)

    @property
    def capacity(self) -> int:
        return self.length

    @property
    def limit(self) -> int | None:
        return self.length

    @property
    def position_cap(self) -> int | None:
        return None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return self.ring.layouts
