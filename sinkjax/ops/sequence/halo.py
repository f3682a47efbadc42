"""A window: each shard takes the last keys to its left, and the sink tokens that it cannot reach.

The keys of a shard are then

    [ sink tokens left of the halo | halo, the W − 1 keys before | its own ]

and of these only tokens of the segment open at the left edge matter, which follow one another: its
index within the row of slots decides, as on one device, who is a sink token, and the distance between
slots who is in the window. So kernels that know positions while tracing serve it, packed or not. Bytes
that move are O(P + W), whatever T is, and every shard has as much to do.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.ops.sequence.carry import open_before, take
from sinkjax.ops.sequence.keys import keys_of, operands_of
from sinkjax.ops.sequence.shift import AXIS, shards, shift
from sinkjax_kernels import masks

GRAIN = 128
"""Slots before a shard's own are a multiple of it where they are more: kernels read whole tiles."""


def halo(attend, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    """`attend(arrays, static)` of whole rows, for a causal window."""
    query, visibility = arrays["query"], arrays["visibility"]
    B, T, _, _ = query.shape
    W, P = visibility.left + 1, sink_tokens(visibility)
    reach = min(W - 1, (shards() - 1) * T)
    keys = keys_of(arrays)
    begins = _begins(visibility.query_segment_ids, B, T)
    near = keys | {"begins": begins}
    near = jax.tree.map(
        lambda before, own: jnp.concatenate([before, own], axis=1), _before(near, reach), near
    )
    # Segment 0 is what was open where the halo begins, or the slots before the row's first token. Sink
    # tokens left of the halo are of it: all of the halo is, if there are any that matter.
    segments = jnp.cumsum(near.pop("begins"), axis=1, dtype=jnp.int32)
    front = P + reach
    front += -front % GRAIN if front > GRAIN else 0
    block = front - reach
    if block:
        near, segments = _with_sinks(near, segments, keys, begins, P, block, reach)

    def lengthen(x):
        return jnp.pad(x, [(0, 0), (front, 0)] + [(0, 0)] * (x.ndim - 2))

    # Queries of the slots in front are computed for nothing: packed kernels take as many as keys.
    sinks = arrays["sinks"]
    call = operands_of(near) | {
        "query": lengthen(query),
        "sinks": lengthen(sinks) if sinks is not None and sinks.ndim == 3 else sinks,
        "visibility": masks.build(
            (B, front + T, front + T, keys["key"].shape[2]),
            is_causal=True,
            local_window_size=(W - 1, 0),
            num_sink_tokens=P,
            query_segment_ids=segments,
            key_segment_ids=segments,
        ),
    }
    return jax.tree.map(lambda x: x[:, front:], attend(arrays | call, static))


def sink_tokens(visibility: masks.Visibility) -> int:
    """P, the first tokens of a row or segment that are sink tokens; what is known while tracing."""
    assert visibility.num_sink_tokens is not None and visibility.key_start is not None
    if visibility.key_segment_ids is not None:
        return visibility.num_sink_tokens
    return max(0, visibility.num_sink_tokens - visibility.key_start)


def _begins(segment_ids, B: int, T: int):
    """True at the first token of each segment of the whole row; `[B, T]`."""
    is_first = (jax.lax.axis_index(AXIS) == 0) & (jnp.arange(T) == 0)
    is_first = jnp.broadcast_to(is_first, (B, T))
    if segment_ids is None:
        return is_first
    ids = jnp.broadcast_to(segment_ids, (B, T))
    last = shift(ids[:, -1:])
    return is_first | (ids != jnp.concatenate([last, ids[:, :-1]], axis=1))


def _before(tree: Any, number: int) -> Any:
    """The last `number` tokens left of each shard, from as many neighbours as have them."""

    def one(x):
        size = x.shape[1]
        pieces = [
            shift(x[:, max(0, size - (number - far)) :], 1 + far // size)
            for far in range(0, number, size)
        ]
        return jnp.concatenate([x[:, :0], *pieces[::-1]], axis=1)

    return jax.tree.map(one, tree)


def _with_sinks(near, segments, keys, begins, P: int, block: int, reach: int):
    """The keys with a block of slots in front that ends with the sink tokens left of the halo."""
    B = segments.shape[0]
    flat = {name: x.reshape(B, -1, math.prod(x.shape[2:])) for name, x in keys.items()}
    widths = {name: x.shape[2] for name, x in flat.items()}
    number, tokens = jnp.zeros((B, 1), jnp.int32), jnp.zeros((B, 1, sum(widths.values())))
    if P:
        length, tokens = open_before(begins, [*flat.values()], P)
        number = jnp.clip(length - reach, 0, P)[:, None]
    slots = jnp.arange(block, dtype=jnp.int32) - (block - number)  # index in the segment
    tokens = take(jnp.clip(slots, 0, tokens.shape[1] - 1), tokens)
    tokens = jnp.where((slots >= 0)[..., None], tokens, 0)
    parts = jnp.split(tokens, np.cumsum([*widths.values()])[:-1], axis=2)
    for (name, x), part in zip(keys.items(), parts, strict=True):
        part = part.reshape(B, block, *x.shape[2:]).astype(x.dtype)
        near[name] = jnp.concatenate([part, near[name]], axis=1)
    return near, jnp.concatenate([jnp.where(slots >= 0, 0, -1), segments], axis=1)
