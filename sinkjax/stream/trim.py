"""Undo: a cache as it was before its last tokens, or a reason why it cannot be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.cache import Cache
from sinkjax.cache.ring import Pinned
from sinkjax.cache.ring_store import Ring
from sinkjax.cache.store import Layout


def trim(cache: Cache, count: int) -> Cache:
    """The cache of one row as if it had never taken its last `count` tokens.

    Empties their slots and sets the clock back. Nothing brings back what their slots held before,
    so this works as long as all that the coming token may look at is still there: before a ring
    has gone round, and then once for the last token (the one that it overwrote had left the window
    when it came).

    Args:
        cache: of one row; every layer a ring (`SinkWindow`, `Full`).
        count: tokens, at most as many as the cache has taken.

    Raises:
        ValueError: something would be missing; says what.
    """
    time = int(cache.time[0])
    if not 0 <= count <= time:
        raise ValueError(f"count: expected 0 to the {time} tokens of the cache, got {count}")
    for store in cache.stores:
        if not isinstance(store, Ring):
            raise ValueError(
                f"count: {type(store).__name__} cannot undo tokens, for what it let go of depended "
                f"on them; keep a fork of the session from before"
            )
    left, layers = time - count, []
    for index, state in enumerate(cache.layers):
        view = cache.layer(index)
        (layout,), (held,) = cache.stores[index].layouts, view.positions
        missing = _missing(layout, held, left, state.decay is not None)
        if count > 0 and missing:
            raise ValueError(
                f"count: layer {index} no longer holds token {max(missing)}, which token {left} "
                f"looks at: the last {count} of {time} tokens cannot be undone"
            )
        if state.decay is not None and left > 0 and count > 0:
            positions = held.positions if isinstance(held, Pinned) else held
            last = int(jnp.argmax(positions[0] == left - 1))  # what came after it has faded it
            decay = jnp.minimum(state.decay - state.decay[:, :, last, None], 0)
            state = dataclasses.replace(state, decay=decay)
        layers.append(state)

    def cleared(held: Any) -> Any:
        if isinstance(held, Pinned):
            return held._replace(positions=cleared(held.positions))
        return jnp.where(held >= left, -1, held)

    return dataclasses.replace(
        cache,
        layers=tuple(layers),
        positions=tuple(cleared(held) for held in cache.positions),
        time=jnp.full_like(cache.time, left),
    )


def _missing(layout: Layout, held: Any, left: int, fading: bool) -> set[int]:
    """Positions that token `left` looks at and that the layer does not hold."""
    P, W = layout.sink_slots, layout.ring_slots
    if isinstance(held, Pinned):
        positions, pins = (np.asarray(leaf)[0] for leaf in jax.tree.leaves(held))
        # Pins from there on are in the ring, too, as long as they are in the window.
        at_once = left if layout.pins_at_once is None else layout.pins_at_once
        sinks = {int(pin) for pin in pins if pin >= 0}
    else:
        positions, at_once, sinks = np.asarray(held)[0], P, set(range(P))
    sinks = {sink for sink in sinks if sink < left}
    window = set(range(max(left - W + 1, 0), left)) - {sink for sink in sinks if sink < at_once}
    missing = (sinks - {*positions[:P].tolist()}) | (window - {*positions[P:].tolist()})
    if fading and left > 0:
        missing |= {left - 1} - {*positions.tolist()}
    return missing
