"""What the forward and the backward TPU kernels share: static tile geometry and arithmetic.

A window kernel sees the keys of a query block as one *span*: the block itself and `reach` keys before
it. Coordinates are relative to the first query of the block; which 128 × 128 tile is full, partial or
empty is then the same for every block but the first few, and known while tracing.

The two passes are

    forward(static, query, key, value, sinks, starts) -> out [B, N, T, Hv], log_denominator [B, N, 1, T]
    backward(static, query, key, value, d_out, log_denominator, delta, starts) -> dq, dk, dv

with arrays `[B, N or K, T, H]`. The logarithm is natural; it and delta (D − dL, `[B, N, 1, T]`) are
None where `not static.policy.has_top`. `starts` is None, or `segments.starts_of` the ids `[B, 1, T]` in
packed rows (`static.ranges.has_segments`): then every tile hides the keys before
`segments.first_keys` of its queries, and the sink tokens outside the window come as a tile per query
block, `segments.sink_tiles`. The backward pass has no offset: its caller puts as many queries without a
gradient in front.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.flash.tpu_blocks import Blocks
from sinkjax_kernels.flash.tpu_policies import ExpSum, Policy

GRAIN = 128  # lanes of a vector register, and rows of the smallest tile that is skipped
VMEM_BYTES = 60 * 2**20  # of the 64 MiB of v5p and tpu7x; v5e and v6e have 128

Piece = tuple[int, int, bool]  # first key, end, whether some pair in it is not visible


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything a compiled program depends on besides shapes."""

    ranges: Ranges
    scale: float
    soft_cap: float | None
    has_sinks: bool
    blocks: Blocks
    interpret: Any = False
    policy: Policy = ExpSum()

    @property
    def fold(self) -> float:
        """What a query is multiplied with, so that scores come out times `policy.base`.

        1 where the rounding of a bfloat16 query would tell: under a soft cap, which multiplies
        anyway, and at the kink of a normaliser.
        """
        if self.soft_cap is None and self.policy.is_smooth:
            return self.scale * self.policy.base
        return 1.0

    def folded(self, query):
        return (query.astype(jnp.float32) * self.fold).astype(query.dtype)

    def capped(self, scores):
        """Logits times `policy.base`, and the slope of the soft cap or None."""
        if self.soft_cap is None:
            rest = self.scale * self.policy.base / self.fold
            return scores if self.policy.is_smooth else scores * rest, None
        squashed = jnp.tanh(scores * (self.scale / self.soft_cap))
        return squashed * (self.soft_cap * self.policy.base), 1 - squashed * squashed


def up(x: int, to: int = GRAIN) -> int:
    """x rounded up to a multiple."""
    return -(-x // to) * to


def reach(window: int) -> int:
    """Keys before a query block that its window needs; one tile at least, so that block 0 is special."""
    return max(GRAIN, up(window - 1))


def span_start(first):
    """First key of a span, `first` if there were keys before key 0; the compiler wants its multiple said."""
    return pl.multiple_of(jnp.maximum(first, 0), GRAIN)


def layout(ranges: Ranges, length: int, most: int) -> tuple[bool, int]:
    """Whether the span of a query block is unrolled as a whole, and the size of a query block.

    Each block before the first whole window needs a body of its own, which bounds the program: spans
    of wider windows, and causal ones, loop over full chunks. Those want blocks of full size; a span
    divides evenly, so that little is padded. In packed rows the sink tokens of a block are one tile.
    """
    if ranges.has_segments and ranges.window is not None and ranges.num_sink_tokens:
        most = min(most, GRAIN // ranges.num_sink_tokens * ranges.window // GRAIN * GRAIN)
    block = min(most, up(length))
    if ranges.window is None or reach(ranges.window) > max(2 * block, 2 * GRAIN):
        return False, block
    return True, up(-(-length // -(-length // block)))


def chunk_size(static: Static, block: int) -> int:
    """Keys of one turn of the loops; edges need a loop of their own, so half keeps the program short."""
    size = static.blocks.chunk
    if static.ranges.window is not None or static.ranges.has_segments:
        size = up(size // 2)
    return math.gcd(size, block)


def chunks_of(first, block: int, chunk: int, window: int | None):
    """Chunks of keys before a query block: [low, full) at the edge of the window, [full, end) full.

    `lax.div`, not `//`: the sign that it asks for cannot be lowered where no TPU is.
    """
    end = jax.lax.div(first, chunk)
    if window is None:
        return 0, 0, end
    low = jax.lax.div(jnp.maximum(first - (window - 1), 0), chunk)
    full = jax.lax.div(jnp.maximum(first + block - window, 0) + (chunk - 1), chunk)
    return low, jnp.minimum(full, end), end


def chunks_from(first, chunk: int, low, full):
    """The same in packed rows, from the first keys of the block's first and last query."""
    end = jax.lax.div(first, chunk)
    return jax.lax.div(low, chunk), jnp.minimum(jax.lax.div(full + (chunk - 1), chunk), end), end


def dot(a, b, contract: tuple[int, int]):
    """A product in float32, contracting axis `contract[0]` of a with `contract[1]` of b."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def staged(items: Sequence, first: Callable, second: Callable, ahead: int = 1) -> None:
    """`second(item, first(item))` of each, the first stage of the next `ahead` items emitted before.

    Why: the compiler schedules in program order; matmuls of the next item then run under the
    exponentials of this one (10–20 % of the bundles of a windowed kernel).
    """
    waiting = [first(item) for item in items[:ahead]]
    for n, item in enumerate(items):
        now = waiting.pop(0)
        if n + ahead < len(items):
            waiting.append(first(items[n + ahead]))
        second(item, now)


def key_pieces(row: int, rows: int, start: int, window: int | None, width: int) -> list[Piece]:
    """Keys that queries [row, row + rows) see, from key `start` on, cut where tiles become partial."""
    end = row + rows  # causal: keys [.., row] are full, [row, end) partial
    low, full = start, start
    if window is not None:
        low = max(start, (row - window + 1) // GRAIN * GRAIN)
        full = max(start, up(row + rows - window))
    if full > row:
        return [(x, min(x + width, end), True) for x in range(low, end, width)]
    pieces = [(x, min(x + width, full), True) for x in range(low, full, width)]
    pieces += [(x, min(x + width, row), False) for x in range(full, row, width)]
    return pieces + [(x, min(x + width, end), True) for x in range(row, end, width)]


def tile_kind(distance: int, window: int | None) -> str:
    """Of a 128 × 128 tile whose first query is `distance` after its first key."""
    nearest, farthest = distance - (GRAIN - 1), distance + (GRAIN - 1)
    if farthest < 0 or (window is not None and nearest >= window):
        return "empty"
    return "full" if nearest >= 0 and (window is None or farthest < window) else "partial"


def distances(shape: tuple[int, int], first, query_axis: int):
    """Query minus key of each pair of a tile; `first` is that of its first query and first key."""
    queries = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    return queries - keys + first


def seen(shape: tuple[int, int], first, window: int | None, query_axis: int):
    """Visible pairs of a tile at the diagonal or at the far edge of the window."""
    distance = distances(shape, first, query_axis)
    where = distance >= 0
    return where if window is None else where & (distance < window)


def sinks_seen(shape: tuple[int, int], first_query, ranges: Ranges, query_axis: int):
    """Visible pairs of the sink tile: sink tokens that have left the window, so none counts twice."""
    assert ranges.window is not None
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    far = distances(shape, first_query, query_axis) >= ranges.window
    return far & (keys < ranges.num_sink_tokens)


def sinks_between(shape: tuple[int, int], first_query, seen_by):
    """Visible pairs of a gathered sink tile, queries × keys; `segments.SinkTiles` as `[2, 128]`."""
    queries = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_query
    return (queries >= seen_by[0:1, :]) & (queries < seen_by[1:2, :])


def not_before(shape: tuple[int, int], first_key, low):
    """Pairs, queries × keys, whose key is not before the first one of its query, a column."""
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return keys >= lanes(low - first_key, shape[1])


def spread_once(row_ref, column_ref) -> None:
    """A compact row as columns that are the same in all lanes, for all heads of a group."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        for x in range(0, row_ref.shape[1], GRAIN):
            part = jnp.broadcast_to(row_ref[:, x : x + GRAIN], (GRAIN, GRAIN))
            column_ref[x : x + GRAIN, :] = part.T


def tall(x):
    """A tile of 128 rows, zeros below what there is."""
    if x.shape[0] == GRAIN:
        return x
    return join([x, jnp.zeros((GRAIN - x.shape[0], x.shape[1]), x.dtype)], 0)


def join(tiles: Sequence, axis: int):
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=axis)


def lanes(x, number: int):
    """A column, or one that is the same in all its lanes, as wide as another tile."""
    if x.shape[1] == 1:
        return x
    return join([x] * -(-number // x.shape[1]), 1)[:, :number]


def pad_axis(x: jax.Array, size: int, axis: int) -> jax.Array:
    """x with zeros after it, or the first `size` of it."""
    if x.shape[axis] >= size:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])
