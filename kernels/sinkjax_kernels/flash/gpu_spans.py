"""Which tiles the GPU kernels visit: closed form, of O(1) per block, nothing that grows with T · S.

A query block sees one run of key blocks, from the far edge of its window to its diagonal, and before
them the sink tokens of the segment that its first query is in: a segment that begins inside the block
has its sink tokens in the run. Blocks inside the run whose pairs are all visible carry no mask.

The gradients of keys walk the other way: a key block is seen by one run of query blocks. What lies
beyond that run are pairs of a sink token and a far query; a kernel of their own sums them (`far`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sinkjax_kernels.flash.gpu_blocks import Tile
from sinkjax_kernels.flash.ranges import Ranges

Run = tuple[Any, Any, Any, Any]
"""First block, first full block, the end of the full ones, end."""


def up(x: int, to: int) -> int:
    """x rounded up to a multiple."""
    return -(-x // to) * to


def _down(x, size: int):
    """Blocks that end at or before x, none for x < 0; `//` would ask a traced x for its sign."""
    if isinstance(x, int):
        return max(x, 0) // size
    x = jnp.maximum(x, 0)
    return jax.lax.div(x, jnp.full_like(x, size))


def _over(x, size: int):
    """Blocks that begin before x, none for x < 0."""
    return _down(x + (size - 1), size)


@dataclasses.dataclass(frozen=True)
class Spans:
    """The tiles of `queries` queries against `keys` keys. Numbers may be traced int32s.

    `start` and `end` are where the segment of a token begins and ends, as key indices.
    """

    ranges: Ranges
    queries: int
    keys: int
    tile: Tile

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.tile.query)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.tile.keys)

    @property
    def has_full(self) -> bool:
        """Whether some tile may be without a hidden pair."""
        window = self.ranges.window
        return window is None or window >= self.tile.query + self.tile.keys - 1

    @property
    def query_edges(self) -> tuple[bool, bool]:
        """Whether the run of a query block may begin, and end, with partial key blocks."""
        return self.ranges.window is not None or self.ranges.has_segments, True

    @property
    def key_edges(self) -> tuple[bool, bool]:
        """The same of a key block and its query blocks."""
        return True, self.query_edges[0] or self.queries % self.tile.query > 0

    def of_query_block(self, i, start=0, last_start=0) -> Run:
        """Key blocks that query block i sees; of its first and its last query the `start`s."""
        bq, bk, window = self.tile.query, self.tile.keys, self.ranges.window
        first = self.ranges.offset + i * bq
        low, full = start, last_start
        if window is not None:
            low = _max(low, first - window + 1)
            full = _max(full, first + bq - window)
        low, full = _down(low, bk), _over(full, bk)
        end = _min(first + bq, self.ranges.offset + self.queries)
        return _ordered(low, full, _down(first + 1, bk), _over(end, bk))

    def sink_end(self, start):
        """The end of the sink tokens of a segment, or of all keys where it is shorter than they."""
        return _min(start + self.ranges.num_sink_tokens, self.keys)

    def sink_tiles(self, low, start, width: int):
        """Tiles of `width` sink tokens before key block `low`, and where the tokens end."""
        end = _min(start + self.ranges.num_sink_tokens, low * self.tile.keys)
        return _over(end - start, width), end

    def of_key_block(self, j, end=None, last_end=None) -> Run:
        """Query blocks that see key block j; of its first and its last key the `end`s."""
        bq, bk, offset = self.tile.query, self.tile.keys, self.ranges.offset
        first = j * bk - offset  # as a query index
        reach, full_reach = self.queries, self.queries
        if self.ranges.window is not None:
            reach = _min(reach, first + bk - 1 + self.ranges.window)
            full_reach = _min(full_reach, first + self.ranges.window)
        if last_end is not None:
            reach, full_reach = _min(reach, last_end), _min(full_reach, end)
        low = _down(first, bq)
        high = _max(low, _over(reach, bq))
        full = _over(first + bk - 1, bq)
        return _ordered(low, full, _down(full_reach, bq), high)

    def far(self, key):
        """First query block that sees a sink token only because it is one: it is beyond `of_key_block`."""
        assert self.ranges.window is not None
        bq, bk = self.tile.query, self.tile.keys
        reach = (_down(key, bk) + 1) * bk - 1 + self.ranges.window - self.ranges.offset
        return _over(reach, bq)


def _min(x, y):
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def _max(x, y):
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)


def _ordered(low, full_low, full_high, high) -> Run:
    """The run with its full blocks cut to it."""
    full_low = _min(_max(full_low, low), high)
    return low, full_low, _min(_max(full_high, full_low), high), high
