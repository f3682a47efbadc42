"""A cache of scores made smaller, with heads of different size where they differ in what they need."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from sinkjax.cache.budgets import Ada, Budget, Uniform
from sinkjax.cache.compose import PerHead, PerLayer
from sinkjax.cache.descriptions import Description, SinkWindow
from sinkjax.cache.policies.keep import keep
from sinkjax.cache.policies.protect import protect
from sinkjax.cache.ring_store import Ring
from sinkjax.cache.scored import Scored, ScoredState, Scores, select
from sinkjax.cache.state import Cache
from sinkjax.cache.state import create as create_cache


def compress(
    cache: Cache, budget: Budget | int, *, shares: Ada | None = None, multiple: int = 8
) -> Cache:
    """The same streams on fewer tokens: those with the highest scores stay.

    On the host, once, after a prompt: the sizes of the arrays follow from the scores. With `shares`
    the heads of a layer get as many tokens as their scores deserve; heads of equal size form a
    `PerHead` group, so that the memory is really given back. Rings stay what they are.

    Args:
        cache: made for `Scored`.
        budget: tokens per key/value head, as in `Scored`.
        shares: how the heads of a layer share it; None: alike.
        multiple: with `shares`, sizes of heads are rounded up to multiples of this, so that fewer
            programs are compiled.

    Returns:
        a cache of another description; the given one is not touched.

    Raises:
        ValueError: a cache with other layers than scored ones and rings, a budget that does not
            hold the protected tokens, or is larger than what is there.

    Source: the shares are those of Feng et al. 2024 (AdaKV), arXiv 2407.11550.
    """
    sizes = budget if isinstance(budget, Budget) else Uniform(budget)
    count = len(cache.specs)
    layers: list[Description] = []
    states: list[Any] = []
    for index, (store, state) in enumerate(zip(cache.stores, cache.layers, strict=True)):
        if isinstance(store, Ring) and store.limit is None:
            mode = "absolute" if store.position_cap is None else "cache_relative"
            layers.append(SinkWindow(store.num_sink_tokens, store.ring_slots, mode))
            states.append(state)
            continue
        if not isinstance(store, Scores):
            raise ValueError(f"cache: expected layers made by Scored, layer {index} is {store!r}")
        size = sizes.layer(index, count)
        least = store.num_sink_tokens + store.window
        if not least <= size <= store.capacity:
            raise ValueError(
                f"budget: expected at least num_sink_tokens + window = {least} and at most the "
                f"{store.capacity} that layer {index} has, got {size}"
            )
        held = _kept(store, state, size, shares)
        tokens = np.asarray((held >= 0).sum(-1).max(0)) if shares else np.full(held.shape[1], size)
        room = np.maximum(-(-tokens // multiple) * multiple, least) if shares else tokens
        groups, parts = [], []
        for slots in sorted(set(room.tolist())):
            heads = tuple(np.flatnonzero(room == slots).tolist())
            groups.append((heads, dataclasses.replace(_description(store), budget=slots)))
            parts.append(_part(state, held, heads, slots))
        one = len(groups) == 1
        layers.append(groups[0][1] if one else PerHead(tuple(groups)))
        states.append(parts[0] if one else tuple(parts))
    empty = create_cache(
        PerLayer(tuple(layers)),
        cache.specs,
        cache.time.shape[0],
        dtype=cache.dtype,
        context_length=cache.context_length,
    )
    return dataclasses.replace(
        empty, layers=tuple(states), positions=cache.positions, time=cache.time
    )


def _kept(store: Scores, state: ScoredState, size: int, shares: Ada | None):
    """Slots that stay, −1 behind the last."""
    safe = protect(state.positions, state.time, store.num_sink_tokens, store.window)
    empty = state.positions < 0
    if shares is None:
        kept = keep(state.scores, safe, empty, size)
        return jnp.where(jnp.take_along_axis(empty, kept, axis=2), -1, kept)
    return shares.keep(state.scores, safe, empty, size).slots


def _description(store: Scores) -> Scored:
    mode = "absolute" if store.position_cap is None else "cache_relative"
    return Scored(
        store.policy, store.capacity, store.num_sink_tokens, store.window, mode, store.every
    )


def _part(state: ScoredState, held, heads: tuple[int, ...], slots: int) -> ScoredState:
    """What some heads hold, in so many slots."""
    mine = np.asarray(heads)
    held = jnp.pad(held[:, mine], ((0, 0), (0, 0), (0, max(slots - held.shape[2], 0))),
                   constant_values=-1)[..., :slots]  # fmt: skip
    queries = state.queries
    if queries is not None:
        K = state.positions.shape[1]
        groups = queries.reshape(*queries.shape[:2], K, -1, queries.shape[3])[:, :, mine]
        queries = groups.reshape(*queries.shape[:2], -1, queries.shape[3])
    part = dataclasses.replace(
        state,
        key=state.key[:, mine],
        value=state.value[:, mine],
        positions=state.positions[:, mine],
        scores=state.scores[:, mine],
        mass=None if state.mass is None else state.mass[:, mine],
        queries=queries,
    )
    scores = jnp.take_along_axis(part.scores, jnp.maximum(held, 0), axis=2)
    return dataclasses.replace(select(part, held), scores=scores)
