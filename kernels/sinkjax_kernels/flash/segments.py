"""Packed rows for the TPU kernels: where segments begin and end, and their sink tokens as tiles.

A segment is known by its *start*, the index of its first token, so that what a query sees is again a
range: the keys [max(start, t − W + 1), t], and sink token p of its segment from query start + p + W on.
All of it is O(T) work in XLA before a kernel runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sinkjax_kernels.flash.ranges import Ranges


def starts_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B 1 T"]:
    """The index of the first token of each token's segment; equal ids are adjacent."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)[:, None]


def first_keys(starts: Int[Array, "B 1 T"], window: int | None) -> Int[Array, "B 1 T"]:
    """The first key that each query sees besides sink tokens: it sees all from there to its own.

    It never decreases along T: that of a block's first query bounds the block.
    """
    if window is None:
        return starts
    index = jnp.arange(starts.shape[-1], dtype=jnp.int32)
    return jnp.maximum(starts, index - (window - 1))


def block_bounds(
    starts: Int[Array, "B 1 T"], block: int, window: int | None
) -> Int[Array, "B 2 blocks"]:
    """First keys of the first and of the last query of each block: what can be seen, what by all."""
    low = first_keys(starts, window)
    return jnp.concatenate([low[..., ::block], low[..., block - 1 :: block]], axis=1)


class SinkTiles(NamedTuple):
    """One tile of sink tokens for each query block: those that its queries see outside the window.

    Row r of block i is the key `index[:, i·R + r]`, seen by the queries [first, end) (absolute indices)
    and by no other, so that no key counts twice; rows that nobody sees have an empty range.

    Args:
        index: `[B, blocks · R]`, always a legal index, for the gather of keys and values in XLA, and
            for the `.at[].add` of their gradients.
        first, end: `[B, blocks, R]`.
    """

    index: Int[Array, "B blocks*R"]
    first: Int[Array, "B blocks R"]
    end: Int[Array, "B blocks R"]


def sink_rows(ranges: Ranges, block: int) -> int:
    """R, the rows of each block's tile of sink tokens in packed rows."""
    assert ranges.window is not None
    rows = ranges.num_sink_tokens * (1 + (block - 1) // ranges.window)
    return -(-rows // 16) * 16


def sink_tiles(starts: Int[Array, "B 1 T"], block: int, ranges: Ranges) -> SinkTiles:
    """The sink tokens of packed rows, by query block; T is a multiple of `block`.

    Query t of block a has sink tokens outside its window only if its segment began W or more before
    t. Then one of the positions a, a + W, a + 2W, … lies in the last W keys of t, so in its segment:
    the segments open at these positions are all that there are.
    """
    assert ranges.window is not None
    W, P = ranges.window, ranges.num_sink_tokens
    B, _, T = starts.shape
    blocks, index = T // block, jnp.arange(T, dtype=jnp.int32)
    starts = starts[:, 0]
    begins = jnp.where(starts == index, index, T)
    later = jax.lax.cummin(begins, axis=1, reverse=True)
    ends = jnp.pad(later[:, 1:], ((0, 0), (0, 1)), constant_values=T)

    def probe(x):  # at the positions of every block: [B, blocks, probes]
        return x.reshape(B, blocks, block)[:, :, ::W]

    start, end = probe(starts), probe(ends)
    twice = jnp.pad(start[..., 1:] == start[..., :-1], ((0, 0), (0, 0), (1, 0)))
    end = jnp.where(twice, 0, end)
    tokens = start[..., None] + jnp.arange(P, dtype=jnp.int32)  # [B, blocks, probes, P]
    end = jnp.broadcast_to(end[..., None], tokens.shape)
    extra = sink_rows(ranges, block) - tokens.shape[2] * P

    def rows(x):
        return jnp.pad(x.reshape(B, blocks, -1), ((0, 0), (0, 0), (0, extra)))

    tokens, end = rows(tokens), rows(end)
    return SinkTiles(jnp.minimum(tokens, T - 1).reshape(B, -1), tokens + W, end)


def gather(x: jax.Array, index: Int[Array, "B R"]) -> jax.Array:
    """Keys or values `[B, K, T, H]` at an index of each batch row: `[B, K, R, H]`."""
    return jnp.take_along_axis(x, index[:, None, :, None], axis=2)
