"""How a layer keeps its older tokens in few bits."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sinkjax.cache import ring
from sinkjax.cache.quantised_body import Body, Coding, Tokens, flat, grouped, join, take
from sinkjax.cache.ring_store import Ring
from sinkjax.cache.store import Attended, Chunk, Finish, LayerSpec, LayerView, Layout, Pool
from sinkjax.ops.rope import rotate


class QuantisedState(NamedTuple):
    """One layer: its first slots and the newest groups in `tokens`, in turn; older groups in `body`."""

    tokens: Tokens
    body: Body


@dataclasses.dataclass(frozen=True)
class QuantisedRing:
    """Layout of one layer of a `Quantised` cache; a `Store`.

    The tokens in full precision are whole groups, so that with the newest ⌈(W − R)/g⌉ groups that
    have left them they cover the window at any time: a group is overwritten when the last of its
    tokens has left the window.

    Pinned tokens belong to no group: their place in it stays empty. One that a query meets in a
    sink slot only once it has left the window is kept in full precision twice, see `Ring`.

    Args:
        plan: mask and size of the ring in its place.
        coding: how groups are stored.
        group_size, residual: g and R.
        first: F, first positions in full precision; 0 where tokens are pinned.
    """

    plan: Ring
    coding: Coding
    group_size: int
    residual: int
    first: int

    @property
    def capacity(self) -> int:
        return self.plan.capacity

    @property
    def limit(self) -> int | None:
        return self.plan.limit

    @property
    def position_cap(self) -> int | None:
        return self.plan.position_cap

    @property
    def layouts(self) -> tuple[Layout, ...]:
        # For the pins; positions are part of the state.
        return tuple(x._replace(ring_slots=1) for x in self.plan.layouts if x.pinned)

    @property
    def lead(self) -> int:
        """Slots before the groups in full precision."""
        if not self.plan.pinned:
            return self.first
        return self.plan.sink_slots * (1 if self.plan.position_cap is None else 2)

    @property
    def recent(self) -> int:
        """Groups in full precision: R tokens wherever they begin, and all of the last group."""
        return -(-(self.residual - 1) // self.group_size) + 1

    @property
    def unprotected(self) -> int:
        """Sink tokens that are quantised with their group."""
        return 0 if self.plan.pinned else max(self.plan.sink_slots - self.first, 0)

    @property
    def lasting(self) -> int:
        """Groups of the body that hold those: never overwritten."""
        return -(-self.unprotected // self.group_size)

    @property
    def turning(self) -> int:
        """Groups of the body that are overwritten in turn."""
        groups = max(-(-(self.plan.ring_slots - self.residual) // self.group_size), 0)
        if self.limit is None:
            return groups
        return min(groups, max((self.limit - self.first - self.residual) // self.group_size, 0))

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> QuantisedState:
        def tokens(*slots: int) -> Tokens:
            shape = (batch_size, spec.num_kv_heads, *slots, spec.head_dim)
            decay = None
            if spec.num_forget_heads > 0:
                wide = jnp.promote_types(dtype, jnp.float32)
                decay = jnp.zeros((batch_size, spec.num_forget_heads, *slots), wide)
            positions = jnp.full((batch_size, 1, *slots), -1, jnp.int32)
            # Two arrays: a step that donates the cache may not be given one buffer twice.
            return Tokens(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, decay)

        # Never there in full precision.
        groups = (self.lasting + self.turning, self.group_size)
        body = jax.eval_shape(lambda: self.coding.encode(tokens(*groups)))
        body = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), body)
        body = body._replace(positions=body.positions - 1)
        return QuantisedState(tokens(self.lead + self.recent * self.group_size), body)

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        pins = view.positions[0].pins if self.plan.pinned else None
        if chunk.positions.shape[1] == 1:
            return self._extend_by_one(view, chunk, pins)
        return self._extend(view, chunk, pins)

    def _extend_by_one(self, view: LayerView, chunk: Chunk, pins) -> tuple[Pool, Finish]:
        """What leaves with this token is quantised first, as the token meets it."""
        F, g, state, token = self.lead, self.group_size, view.state, chunk.positions
        slots = F + self.recent * g
        groups = grouped(take(state.tokens, F, None), g)
        gone = self._gone(groups, token)[:, 0]

        def store(body: Body) -> Body:
            return self._store(body, self.coding.encode(groups), token)

        # Most tokens complete no group.
        body = jax.lax.cond(gone.any(), store, lambda body: body, state.body)
        is_first, slot = self._first_slots(token, pins)
        index = jnp.where(is_first, slot, F + (token - self.first) % (slots - F))
        index = jnp.where(token >= 0, index, slots)
        left = jnp.pad(jnp.repeat(gone, g, axis=1), [(0, 0), (F, 0)])[:, None]
        kept = jnp.where(left, -1, state.tokens.positions)
        decay = state.tokens.decay
        if chunk.faded is not None:
            decay = ring.write(decay, index, -chunk.faded)
        held = state.tokens._replace(
            positions=ring.write(kept, index, token[..., None]), decay=decay
        )
        moved = self.unprotected

        def finish(attended: Attended) -> QuantisedState:
            def ours(leaf: Array) -> Array:
                if moved == 0:
                    return leaf[:, :, :slots]
                return jnp.concatenate([leaf[:, :, :F], leaf[:, :, F + moved : slots + moved]], 2)

            new = held._replace(key=ours(attended.key), value=ours(attended.value))
            new = self._with_late_pins(new, chunk, pins)
            return _aged(QuantisedState(new, body), chunk.faded)

        tokens = self._arranged(held, self.coding.decode(body, view.spec.head_dim, view.dtype))
        slot = jnp.where(index < F, index, index + moved)
        # Padding is written nowhere.
        slot = jnp.where(index < slots, slot, tokens.key.shape[2])[:, 0]
        return self._pool(tokens, slot=slot), finish

    def _extend(self, view: LayerView, chunk: Chunk, pins) -> tuple[Pool, Finish]:
        """A group that leaves within the chunk is in the pool twice, and each query meets one.

        The chunk is laid in groups behind those that are held, except for what belongs to the last
        of these.
        """
        F, g, n, token = self.lead, self.group_size, self.recent, chunk.positions
        B, T = token.shape
        old: QuantisedState = view.state
        more = (T + g - 2) // g + 1
        leaving = n + -(-max(T - self.residual, 0) // g)
        last = self._group_of(old.tokens.positions[:, 0, F:]).max(1, keepdims=True)
        is_first, slot = self._first_slots(token, pins)
        group = jnp.where(is_first, -1, self._group_of(token))
        # The first group that is laid behind; far away if none is.
        begin = jnp.where(group >= 0, group, ring.LIMIT // g).min(1, keepdims=True)
        begin = begin + (begin == last)
        place = jnp.where(group == last, group % n, n + group - begin)
        index = jnp.where(is_first, slot, F + place * g + (token - self.first) % g)
        slots = F + (n + more) * g
        outside = slots + jnp.arange(T, dtype=index.dtype)
        index = jnp.where((token >= 0) & (index < slots), index, outside)
        new = Tokens(
            chunk.key,
            jnp.where(_has_gaps(token)[:, None, None, None], jnp.nan, chunk.value),
            token[..., None],
            None if chunk.faded is None else -chunk.faded,
        )
        room = jax.tree.map(
            lambda leaf: jnp.zeros((B, leaf.shape[1], more * g, *leaf.shape[3:]), leaf.dtype),
            old.tokens,
        )
        room = room._replace(positions=room.positions - 1)
        tokens = jax.tree.map(
            lambda leaf, new: ring.write(leaf, index, new), join(old.tokens, room), new
        )
        tokens = self._with_late_pins(tokens, chunk, pins)
        groups = grouped(take(tokens, F, None), g)
        newest = jnp.maximum(token, old.tokens.positions.max((1, 2))[:, None]).max(1, keepdims=True)
        fresh = self.coding.encode(take(groups, 0, leaving))
        body = self._store(old.body, fresh, newest)
        # Lasting groups are written once and never move: where they will lie, they serve the chunk.
        seen = join(take(body, 0, self.lasting), take(old.body, self.lasting, None), fresh)
        gone = self._gone(seen, token)
        twice = jnp.arange(gone.shape[2]) >= self.lasting + self.turning
        gone = gone & ~(twice & (self._held(seen) < self.lasting))[:, None]
        there = ~jnp.repeat(self._gone(groups, token), g, axis=2)
        there = jnp.pad(there, [(0, 0), (0, 0), (F, 0)], constant_values=True)
        visible = self._arranged(there, jnp.repeat(gone, g, axis=2))
        pool = self._arranged(tokens, self.coding.decode(seen, view.spec.head_dim, view.dtype))

        # The ring again: in each place the newest group that belongs there.
        newest_group = jnp.maximum(last, group.max(1, keepdims=True))
        wanted = newest_group - (newest_group - jnp.arange(n)) % n
        source = jnp.where(wanted >= begin, n + wanted - begin, jnp.arange(n))
        kept = jax.tree.map(
            lambda leaf: jnp.take_along_axis(
                leaf, source.reshape(B, 1, n, *(1,) * (leaf.ndim - 3)), axis=2
            ),
            groups,
        )
        stays = (self._held(kept) == wanted) & ~self._gone(kept, newest)[:, 0]
        kept = kept._replace(positions=jnp.where(stays[:, None, :, None], kept.positions, -1))
        after = QuantisedState(join(take(tokens, 0, F), flat(kept)), body)
        return self._pool(pool, visible=visible[:, None]), lambda _: _aged(after, chunk.faded)

    def _pool(self, tokens: Tokens, **more: Any) -> Pool:
        positions = tokens.positions[:, 0]
        if self.plan.pinned:
            positions, more["sink_positions"] = self.plan.shown(self.layouts[0], positions)
        return Pool(
            tokens.key,
            tokens.value,
            positions,
            sink_slots=self.plan.sink_slots,
            num_sink_tokens=self.plan.num_sink_tokens,
            window=self.plan.window,
            decay=tokens.decay,
            **more,
        )

    def _arranged(self, tokens: Any, body: Any) -> Any:
        """Sink slots lead, also those that are not protected."""
        F, moved = self.lead, self.unprotected
        if moved == 0:
            return join(tokens, body)
        return join(
            take(tokens, 0, F), take(body, 0, moved), take(tokens, F, None), take(body, moved, None)
        )

    def _first_slots(
        self, token: Int[Array, "B T"], pins: Int[Array, "B P"] | None
    ) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
        """Tokens that belong to no group, and the slot of each."""
        if pins is None:
            return (token >= 0) & (token < self.first), token
        is_sink, slot = ring.sinks(self.layouts[0], token, pins)
        is_pin, _ = ring.sinks(self.layouts[0]._replace(pins_at_once=None), token, pins)
        return is_pin, jnp.where(is_sink, slot, self.plan.sink_slots + slot)

    def _with_late_pins(
        self, tokens: Tokens, chunk: Chunk, pins: Int[Array, "B P"] | None
    ) -> Tokens:
        """Pins of the chunk that are in the window first, also as their sink slot will show them."""
        if pins is None or self.plan.position_cap is None:
            return tokens
        come, at = ring.late_pins(self.layouts[0], chunk.positions, pins)
        slot = jnp.broadcast_to(jnp.arange(pins.shape[1], dtype=pins.dtype), pins.shape)
        key, value = (jnp.take_along_axis(x, at[..., None, None], 1) for x in chunk[:2])
        if chunk.rope is not None:
            key = rotate(key, jnp.where(come, slot - pins, 0), chunk.rope)
        faded = chunk.faded
        decay = None if faded is None else -jnp.take_along_axis(faded, at[..., None], 1)
        return jax.tree.map(
            lambda leaf, new: ring.write(leaf, slot, new, where=come),
            tokens,
            Tokens(key, value, pins[..., None], decay),
        )

    def _group_of(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """n, −1 for the first positions and for empty slots."""
        group = (positions - self.first) // self.group_size
        return jnp.where(positions >= self.first, group, -1)

    def _held(self, groups: Tokens | Body) -> Int[Array, "B n"]:
        """Which group is there, −1 for none."""
        return self._group_of(groups.positions[:, 0].max(-1))

    def _gone(self, groups: Tokens | Body, time: Int[Array, "B T"]) -> Bool[Array, "B T n"]:
        """Whether a query at that time meets this group quantised: the rule of `Quantised`."""
        group, g = self._held(groups)[:, None], self.group_size
        # Not from its last position, which may be past int32.
        age = time[..., None] - (self.first + group * g)
        return (group >= 0) & (age >= self.residual + g - 1)

    def _store(self, body: Body, fresh: Body, time: Int[Array, "B 1"]) -> Body:
        """Write the groups that have left by that time, and that later ones do not overwrite."""
        held, gone = self._held(fresh), self._gone(fresh, time)[:, 0]
        newest = (time - self.residual - self.first + 1) // self.group_size - 1
        ours = gone & ((held < self.lasting) | (held > newest - self.turning))
        turn = self.lasting + (held - self.lasting) % self.turning
        outside = self.lasting + self.turning + jnp.arange(held.shape[1], dtype=held.dtype)
        index = jnp.where(ours, jnp.where(held < self.lasting, held, turn), outside)
        return jax.tree.map(
            lambda leaf, new: ring.write(leaf, index, new.swapaxes(1, 2)), body, fresh
        )


def _aged(state: QuantisedState, faded: Float[Array, "B T N"] | None) -> QuantisedState:
    """Decay counts backwards from the end of what the row has seen."""
    if faded is None:
        return state
    total, (tokens, body) = faded[:, -1, :, None], state
    return QuantisedState(
        tokens._replace(decay=tokens.decay + total),
        body._replace(decay=body.decay + total[..., None]),
    )


def _has_gaps(positions: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Whether positions within a chunk jump: there is no room for the groups that they skip."""
    before = jax.lax.cummax(positions, axis=1)[:, :-1]
    jumps = (positions[:, 1:] >= 0) & (before >= 0) & (positions[:, 1:] != before + 1)
    return jumps.any(axis=1)
