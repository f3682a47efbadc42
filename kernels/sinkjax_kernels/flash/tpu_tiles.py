"""What the forward and the backward TPU kernels share: static tile geometry and arithmetic.

A window kernel sees the keys of a query block as one *span*: the block itself and `reach` keys before
it. Coordinates are relative to the first query of the block; which 128 × 128 tile is full, partial or
empty is then the same for every block but the first few, and known while tracing.
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
        """What a query is multiplied with: scores come out times `policy.base`, or for tanh."""
        if self.soft_cap is None:
            return self.scale * self.policy.base
        return self.scale / self.soft_cap

    def folded(self, query):
        return (query.astype(jnp.float32) * self.fold).astype(query.dtype)

    def capped(self, scores):
        """Logits times `policy.base`, and the slope of the soft cap or None."""
        if self.soft_cap is None:
            return scores, None
        squashed = jnp.tanh(scores)
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
    divides evenly, so that little is padded.
    """
    block = min(most, up(length))
    if ranges.window is None or reach(ranges.window) > max(2 * block, 2 * GRAIN):
        return False, block
    return True, up(-(-length // -(-length // block)))


def chunk_size(static: Static, block: int) -> int:
    """Keys of one turn of the loops; a window has two of them, so half keeps the program short."""
    size = static.blocks.chunk
    if static.ranges.window is not None:
        size = up(size // 2)
    return math.gcd(size, block)


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


def staged(items: Sequence, first: Callable, second: Callable) -> None:
    """`second(item, first(item))` of each, the first stage of the next item emitted ahead.

    Why: the compiler schedules in program order; matmuls of the next item then run under the
    exponentials of this one (10–20 % of the bundles of a windowed kernel).
    """
    ahead = first(items[0]) if items else None
    for n, item in enumerate(items):
        now = ahead
        if n + 1 < len(items):
            ahead = first(items[n + 1])
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
