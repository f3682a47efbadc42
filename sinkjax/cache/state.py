"""The arrays of a cache: a pytree of per-layer leaves, shared positions and one clock per row."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int

from sinkjax.cache import ring
from sinkjax.cache.descriptions import Description
from sinkjax.cache.layout import laid_out_as, on_host
from sinkjax.cache.store import LayerSpec, LayerView, Layout, Store


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "positions", "time"],
    meta_fields=["description", "specs", "context_length", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """A stream's memory, of constant size however long the stream gets.

    Args:
        layers: the state of every layer, as its store made it.
        positions: `[B, C]` int32 for each layout among the layers, a `ring.Pinned` for one with pins;
            −1 is an empty slot.
        time: `[B]` int32, the number of tokens each row has taken, which is its next position.
        description: what is kept.
        specs: what the layers were trained with.
        context_length: tokens the model was trained on, or None.
        dtype: of stored keys and values.
    """

    layers: tuple[Any, ...]
    positions: tuple[Any, ...]
    time: Any
    description: Description
    specs: tuple[LayerSpec, ...]
    context_length: int | None
    dtype: str

    @property
    def stores(self) -> tuple[Store, ...]:
        """How each layer keeps it."""
        return _stores(self.description, self.specs)

    @property
    def capacity(self) -> int:
        """Of the largest layer: the most tokens the model can still look at."""
        return max(store.capacity for store in self.stores)

    @property
    def limit(self) -> int | None:
        """First position that does not fit, or None for a cache that streams without end."""
        return _limit(self.stores)

    @property
    def evicted(self) -> Int[Array, " B"]:
        """Tokens of each row that the largest layer can no longer look at."""
        return jnp.maximum(self.time - self.capacity, 0)

    @property
    def num_pins(self) -> int:
        """P, sink slots whose tokens are given by `pin`; 0 for a cache that has none."""
        return max((x.sink_slots for x in _layouts(self.stores) if x.pinned), default=0)

    @property
    def sink_positions(self) -> Int[Array, "B P"] | None:
        """Positions of the pinned tokens of each row, −1 for none; None without slots for pins."""
        pins = [held.pins for held in self.positions if isinstance(held, ring.Pinned)]
        return max(pins, key=lambda x: x.shape[1]) if pins else None

    def pin(
        self,
        positions: ArrayLike | Sequence[int],
        *,
        rows: ArrayLike | Sequence[bool] | None = None,
    ) -> "Cache":
        """Say which tokens of the text to come are sinks: they are kept for ever once they come.

        On the host or inside jit, where a token that has passed cannot be refused: it is not kept.

        Args:
            positions: `[B, P]` or `[P]` for all rows, at most as many as there are slots; −1 is none.
            rows: `[B]`, True where to pin; None is every row. What was pinned in them is forgotten.

        Raises:
            ValueError: a description without slots for pins, too many of them, one twice, or a row
                that is not empty.
        """
        B, P = self.time.shape[0], self.num_pins
        if P == 0:
            raise ValueError(
                "pin: the cache has no slots for pinned tokens; "
                f"SinkWindow(num_sink_tokens='auto') has, got {self.description}"
            )
        traced = any(isinstance(x, Tracer) for x in (positions, rows, self.time))
        xp: Any = jnp if traced else np
        pins = xp.atleast_2d(xp.asarray(positions)).astype("int32")
        if pins.ndim != 2 or pins.shape[0] not in (1, B) or pins.shape[1] > P:
            raise ValueError(
                f"positions: expected [B, P] or [P] with B={B} and at most P={P}, got {pins.shape}"
            )
        where = xp.ones(B, bool) if rows is None else xp.asarray(rows)
        pins = xp.broadcast_to(pins, (B, pins.shape[1]))
        if not traced:
            _check_pins(pins[where], on_host(self.time)[where])
        # Ascending, so that sinks keep the order they have in the text; then those that are none.
        pins = xp.sort(xp.where(pins < 0, ring.LIMIT, pins), axis=1)
        pins = xp.where(pins == ring.LIMIT, -1, pins)
        pins = xp.pad(pins, ((0, 0), (0, P - pins.shape[1])), constant_values=-1)

        def put(held):
            if not isinstance(held, ring.Pinned):
                return held
            new = pins[:, : held.pins.shape[1]]
            return held._replace(pins=jnp.where(where[:, None], new, held.pins))

        return dataclasses.replace(self, positions=tuple(map(put, self.positions)))

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def layer(self, index: int) -> LayerView:
        """What layer `index` attends to."""
        store, layouts = self.stores[index], _layouts(self.stores)
        positions = tuple(self.positions[layouts.index(layout)] for layout in store.layouts)
        return LayerView(self.layers[index], positions, store, self.specs[index], self.dtype)

    def next_positions(self, length: int) -> Int[Array, "B T"]:
        """Positions t + (0 … length − 1) of the coming tokens; those past int32 are refused."""
        offset = jnp.arange(length, dtype=jnp.int32)
        fits = self.time[:, None] < ring.LIMIT - offset
        return jnp.where(fits, self.time[:, None] + offset, ring.REFUSED)

    def advance(self, layers: Sequence[Any], positions: Int[Array, "B T"]) -> "Cache":
        """The cache after a chunk: the layers' new states, positions written, clocks moved.

        Args:
            layers: the new state of every layer, in order.
            positions: as given to `attend`; −1 moves no clock.

        A row that was given a position past int32 is stuck at the end of time: all its later
        tokens give NaN.
        """
        if len(layers) != len(self.layers):
            raise ValueError(f"layers: expected {len(self.layers)} states, got {len(layers)}")
        written = []
        for layout, old in zip(_layouts(self.stores), self.positions, strict=True):
            record = functools.partial(ring.record, layout)
            written.append(laid_out_as(old, record, old, positions))
        beyond = ((positions < -1) | (positions >= ring.LIMIT)).any(axis=1)
        last = jnp.where(positions < ring.LIMIT, positions + 1, 0).max(axis=1, initial=0)
        time = jnp.where(beyond, ring.LIMIT, jnp.maximum(self.time, last))
        return dataclasses.replace(self, layers=tuple(layers), positions=tuple(written), time=time)

    def reset_rows(self, mask: Bool[Array, " B"]) -> "Cache":
        """Empty the rows where `mask` is True, for a new text; the other rows do not notice."""
        empty = _empty(self.description, self.specs, 1, self.dtype, self.context_length)

        def clear(leaf, fresh):
            return jnp.where(mask.reshape(-1, *(1,) * (leaf.ndim - 1)), fresh, leaf)

        return jax.tree.map(clear, self, empty)

    def require_room(self, length: ArrayLike, *, at: ArrayLike | None = None) -> None:
        """Refuse, on the host, tokens the cache cannot take; warn of those it was not made for.

        Args:
            length: number of tokens to come, for every row or per row.
            at: tokens taken so far where the caller knows; None reads the clock of each row.

        Raises:
            ValueError: a clock would pass int32, or a `Full` cache its length.
        """
        begin = (on_host(self.time) if at is None else np.asarray(at)).astype(np.int64)
        begin, end = np.broadcast_arrays(begin, begin + np.asarray(length))
        row = int(np.argmax(end))
        held, last = int(begin.flat[row]), int(end.flat[row])
        if last > ring.LIMIT:
            raise ValueError(
                f"length: the clock of a stream ends at {ring.LIMIT} (int32), got {last - held} "
                f"more tokens at {held}; reset the row"
            )
        limit, trained = self.limit, self.context_length
        if limit is not None and last > limit:
            raise ValueError(
                f"length: a Full cache of length {limit} holds {held} tokens "
                f"and cannot take {last - held} more; SinkWindow streams without end"
            )
        if trained is not None and any(store.position_cap is None for store in self.stores):
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
    if not isinstance(description, Description):
        raise ValueError(f"description: expected SinkWindow, Full or another, got {description!r}")
    if not layers:
        raise ValueError("layers: expected at least one LayerSpec, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    specs = tuple(layers)
    stores = _stores(description, specs)
    caps = [store.position_cap for store in stores]
    if context_length is not None:
        capped = 1 + max((cap for cap in caps if cap is not None), default=-1)
        if capped > context_length:
            raise ValueError(
                f"description: cache_relative needs at most context_length={context_length} slots, "
                f"got num_sink_tokens + window = {capped}"
            )
        slots = max(store.capacity for store in stores)
        if None in caps and slots > context_length:
            warnings.warn(
                f"a cache of {slots} slots at absolute positions reaches past the context_length "
                f"of {context_length} that the model was trained on",
                stacklevel=2,
            )
    return _empty(description, specs, batch_size, jnp.dtype(dtype).name, context_length)


def _empty(
    description: Description,
    specs: tuple[LayerSpec, ...],
    batch_size: int,
    dtype: str,
    context_length: int | None,
) -> Cache:
    stores = _stores(description, specs)
    return Cache(
        layers=tuple(
            store.empty(spec, batch_size, dtype) for store, spec in zip(stores, specs, strict=True)
        ),
        positions=tuple(_empty_positions(layout, batch_size) for layout in _layouts(stores)),
        time=jnp.zeros((batch_size,), jnp.int32),
        description=description,
        specs=specs,
        context_length=context_length,
        dtype=dtype,
    )


def _empty_positions(layout: Layout, batch_size: int) -> Any:
    held = jnp.full((batch_size, layout.sink_slots + layout.ring_slots), -1, jnp.int32)
    if not layout.pinned:
        return held
    return ring.Pinned(held, jnp.full((batch_size, layout.sink_slots), -1, jnp.int32))


def _check_pins(pins: np.ndarray, time: np.ndarray) -> None:
    for row, taken in zip(pins, time, strict=True):
        given = row[row >= 0].tolist()
        if len(set(given)) < len(given):
            raise ValueError(f"positions: expected each token once, got {given}")
        if taken > 0:
            raise ValueError(f"pin: expected rows without tokens, got one at {taken}; reset it")


@functools.lru_cache(maxsize=64)
def _stores(description: Description, specs: tuple[LayerSpec, ...]) -> tuple[Store, ...]:
    return tuple(description.store(spec, i, len(specs)) for i, spec in enumerate(specs))


def _layouts(stores: Sequence[Store]) -> list[Layout]:
    """The distinct layouts, in order of first appearance."""
    return list(dict.fromkeys(layout for store in stores for layout in store.layouts))


def _limit(stores: Sequence[Store]) -> int | None:
    return min((s.limit for s in stores if s.limit is not None), default=None)
