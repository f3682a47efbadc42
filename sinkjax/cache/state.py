"""The arrays of a cache: a pytree of per-layer leaves, shared positions and one clock per row."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int

from sinkjax.cache import ring
from sinkjax.cache.descriptions import Description, Full, LayerPlan, LayerSpec, SinkWindow, plan


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "value", "decay"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LayerState:
    """Keys, rotated at their true positions, and values of one layer: `[B, K, C, H]` each.

    A layer with a forget gate also has `decay` `[B, N, C]`: the log gates from the token of a slot
    to the last one, at most 0. Counted from the end, it never outgrows its float.
    """

    # `Any` in pytrees: their leaves are not always arrays (`jax.eval_shape`, `jax.tree.map`).
    key: Any
    value: Any
    decay: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "positions", "decay"],
    meta_fields=["plan", "spec"],
)
@dataclasses.dataclass(frozen=True)
class LayerView:
    """What `attend` needs of a cache to serve one layer: its leaves, and `[B, C]` positions."""

    key: Any
    value: Any
    positions: Any
    plan: LayerPlan
    spec: LayerSpec
    decay: Any = None

    @property
    def capacity(self) -> int:
        """Slots of this layer."""
        return self.plan.capacity


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "positions", "time"],
    meta_fields=["description", "specs", "context_length"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """A stream's memory, of constant size however long the stream gets.

    Args:
        layers: one `LayerState` per layer.
        positions: `[B, C]` int32 per group of layers of one layout; −1 is an empty slot.
        time: `[B]` int32, the number of tokens each row has taken, which is its next position.
        description: what is kept.
        specs: what the layers were trained with.
        context_length: tokens the model was trained on, or None.
    """

    layers: tuple[LayerState, ...]
    positions: tuple[Any, ...]
    time: Any
    description: Description
    specs: tuple[LayerSpec, ...]
    context_length: int | None

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """Layout and mask per layer."""
        return tuple(plan(self.description, spec) for spec in self.specs)

    @property
    def capacity(self) -> int:
        """Slots of the largest layer: the most tokens the model can still look at."""
        return max(p.capacity for p in self.plans)

    @property
    def evicted(self) -> Int[Array, " B"]:
        """Tokens of each row that no layer holds any more."""
        return jnp.maximum(self.time - self.capacity, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: int) -> LayerView:
        """What layer `index` attends to."""
        state, plans = self.layers[index], self.plans
        positions = self.positions[_groups(plans).index(_layout(plans[index]))]
        return LayerView(
            state.key, state.value, positions, plans[index], self.specs[index], state.decay
        )

    def next_positions(self, length: int) -> Int[Array, "B T"]:
        """Positions t + (0 … length − 1) of the coming tokens; those past int32 are refused."""
        offset = jnp.arange(length, dtype=jnp.int32)
        fits = self.time[:, None] < ring.LIMIT - offset
        return jnp.where(fits, self.time[:, None] + offset, ring.REFUSED)

    def advance(self, layers: Sequence[LayerState], positions: Int[Array, "B T"]) -> "Cache":
        """The cache after a chunk: the layers' new states, positions written, clocks moved.

        Args:
            layers: the `LayerState` of every layer, in order.
            positions: as given to `attend`; −1 moves no clock.

        A row that was given a position past int32 is stuck at the end of time: all its later
        tokens give NaN.
        """
        if len(layers) != len(self.layers):
            raise ValueError(f"layers: expected {len(self.layers)} states, got {len(layers)}")
        written, plans = [], self.plans
        for layout, old in zip(_groups(plans), self.positions, strict=True):
            group = next(p for p in plans if _layout(p) == layout)
            kept = ring.served(group, positions)
            written.append(ring.write(old, ring.slots(group, positions), kept))
        beyond = ((positions < -1) | (positions >= ring.LIMIT)).any(axis=1)
        last = jnp.where(positions < ring.LIMIT, positions + 1, 0).max(axis=1, initial=0)
        time = jnp.where(beyond, ring.LIMIT, jnp.maximum(self.time, last))
        return dataclasses.replace(self, layers=tuple(layers), positions=tuple(written), time=time)

    def reset_rows(self, mask: Bool[Array, " B"]) -> "Cache":
        """Empty the rows where `mask` is True, for a new text; the other rows do not notice."""

        def clear(leaf, empty):
            where = mask.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(where, jnp.asarray(empty, leaf.dtype), leaf)

        return dataclasses.replace(
            self,
            layers=jax.tree.map(lambda leaf: clear(leaf, 0), self.layers),
            positions=tuple(clear(leaf, -1) for leaf in self.positions),
            time=clear(self.time, 0),
        )

    def require_room(self, length: ArrayLike, *, at: ArrayLike | None = None) -> None:
        """Refuse, on the host, tokens the cache cannot take; warn of those it was not made for.

        Args:
            length: number of tokens to come, for every row or per row.
            at: tokens taken so far where the caller knows; None reads the clock of each row.

        Raises:
            ValueError: a clock would pass int32, or a `Full` cache its length.
        """
        begin = np.asarray(self.time if at is None else at).astype(np.int64)
        begin, end = np.broadcast_arrays(begin, begin + np.asarray(length))
        row = int(np.argmax(end))
        held, last = int(begin.flat[row]), int(end.flat[row])
        if last > ring.LIMIT:
            raise ValueError(
                f"length: the clock of a stream ends at {ring.LIMIT} (int32), got {last - held} "
                f"more tokens at {held}; reset the row"
            )
        if isinstance(self.description, Full) and last > self.description.length:
            raise ValueError(
                f"length: a Full cache of length {self.description.length} holds {held} tokens "
                f"and cannot take {last - held} more; SinkWindow streams without end"
            )
        trained = self.context_length
        if trained is not None and self.description.position_mode == "absolute":
            if ((begin <= trained) & (end > trained)).any():  # once per stream, at the crossing
                warnings.warn(
                    f"absolute positions from here on are past the context_length of {trained} "
                    f"that the model was trained on",
                    stacklevel=3,
                )


def create(
    description: Description,
    layers: Sequence[LayerSpec],
    batch_size: int,
    *,
    dtype: DTypeLike = jnp.float32,
    context_length: int | None = None,
) -> Cache:
    """An empty cache.

    Args:
        description: what to keep.
        layers: shape and trained mask of every layer, in order.
        batch_size: rows, each with a clock of its own.
        dtype: of keys and values.
        context_length: tokens the model was trained on; None skips the check.

    Raises:
        ValueError: no layers, no rows, or `cache_relative` with more slots than the context length.
    """
    if not isinstance(description, SinkWindow | Full):
        raise ValueError(f"description: expected SinkWindow or Full, got {description!r}")
    if not layers:
        raise ValueError("layers: expected at least one LayerSpec, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    specs = tuple(layers)
    plans = tuple(plan(description, spec) for spec in specs)
    slots = max(description.capacity, *(p.capacity for p in plans))
    if context_length is not None and slots > context_length:
        if description.position_mode == "cache_relative":
            raise ValueError(
                f"description: cache_relative needs at most context_length={context_length} slots, "
                f"got num_sink_tokens + window = {slots}"
            )
        warnings.warn(
            f"a cache of {slots} slots at absolute positions reaches past the context_length of "
            f"{context_length} that the model was trained on",
            stacklevel=2,
        )

    def empty(spec: LayerSpec, p: LayerPlan) -> LayerState:
        # Two arrays: a step that donates the cache may not be given one buffer twice.
        shape = (batch_size, spec.num_kv_heads, p.capacity, spec.head_dim)
        decay = None
        if spec.num_forget_heads > 0:
            wide = jnp.promote_types(dtype, jnp.float32)
            decay = jnp.zeros((batch_size, spec.num_forget_heads, p.capacity), wide)
        return LayerState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), decay)

    return Cache(
        layers=tuple(empty(spec, p) for spec, p in zip(specs, plans, strict=True)),
        positions=tuple(
            jnp.full((batch_size, sum(layout)), -1, jnp.int32) for layout in _groups(plans)
        ),
        time=jnp.zeros((batch_size,), jnp.int32),
        description=description,
        specs=specs,
        context_length=context_length,
    )


def _layout(p: LayerPlan) -> tuple[int, int]:
    return p.sink_slots, p.ring_slots


def _groups(plans: Sequence[LayerPlan]) -> list[tuple[int, int]]:
    """The distinct layouts, in order of first appearance."""
    return list(dict.fromkeys(_layout(p) for p in plans))
