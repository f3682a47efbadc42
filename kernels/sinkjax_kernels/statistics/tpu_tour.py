"""Which tiles of [T, S] the TPU statistics visit, and in which order: arithmetic on grid indices.

A stop is a tile of one query block and one key block. With a window, each query block has a row of the
grid of its own. Without one the query blocks have 1, 2, 3, … stops: the first and the last share a row
of the grid, the second and the last but one, and so on, so that hardly a step of the grid is idle.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.flash.tpu_tiles import GRAIN, up


class Stop(NamedTuple):
    """Where a step of the grid is.

    Attributes:
        i, j: query block and key block; those of a neighbour where nothing is visited.
        is_visited: whether the tile may hold a visible pair.
        is_first, is_last: whether the query block begins here, ends here.
    """

    i: Any
    j: Any
    is_visited: Any
    is_first: Any
    is_last: Any


@dataclasses.dataclass(frozen=True)
class Tour:
    """Tiles of `block_q` × `block_k` of T queries and S keys, one at least for each query.

    `start` is always the first index of the segment of a block's first query, 0 without segments.
    """

    ranges: Ranges
    T: int
    S: int
    block_q: int
    block_k: int

    @property
    def query_blocks(self) -> int:
        return -(-self.T // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.S // self.block_k)

    @property
    def sink_tiles(self) -> int:
        """Tiles of 128 keys that hold the sink tokens; those of packed rows begin anywhere in one."""
        P = self.ranges.num_sink_tokens
        return up(P) // GRAIN + self.ranges.has_segments if P else 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows, and steps of each row."""
        n = self.query_blocks
        ends = [self.last(i) for i in range(n)]
        if self.ranges.window is None:
            return -(-n // 2), max(ends[i] + ends[n - 1 - i] + 2 for i in range(n))
        return n, max(end - self.first(i, 0) + 1 for i, end in enumerate(ends))

    @property
    def pairs(self) -> int:
        """Pairs in the tiles that are visited, all of one segment."""
        stops = [self.last(i) - self.first(i, 0) + 1 for i in range(self.query_blocks)]
        sinks = self.query_blocks * self.sink_tiles * GRAIN
        return self.block_q * (sum(stops) * self.block_k + sinks)

    def first_query(self, i):
        """Query block i begins at this key."""
        return self.ranges.offset + i * self.block_q

    def first(self, i, start):
        """First key block that the window of query block i touches."""
        key = start
        if self.ranges.window is not None:
            key = _largest(key, self.first_query(i) - (self.ranges.window - 1))
        return _divided(key, self.block_k)

    def last(self, i):
        """Last key block that query block i sees."""
        end = _smallest(self.first_query(i + 1), self.ranges.offset + self.T)
        return _divided(end - 1, self.block_k)

    def stop(self, row, step, start_of) -> Stop:
        """The stop of a step of the grid; `start_of(i)` is the `start` of query block i."""
        if self.ranges.window is not None:
            first, last = self.first(row, start_of(row)), self.last(row)
            j = first + step
            is_last = step == self.grid[1] - 1
            return Stop(row, jnp.minimum(j, last), j <= last, step == 0, is_last)
        other = self.query_blocks - 1 - row
        end = self.last(row)
        is_second = step > end
        i = jnp.where(is_second, other, row)
        j = jnp.where(is_second, step - end - 1, step)
        first, last = self.first(i, start_of(i)), self.last(i)
        is_new = ~is_second | (other != row)  # a block in the middle has its row for itself
        return Stop(
            i,
            jnp.clip(j, first, last),
            is_new & (j >= first) & (j <= last),
            is_new & (j == 0),
            is_new & (j == last),
        )

    def sink_tile(self, n: int, i, start):
        """The n-th tile with sink tokens that query block i sees, and whether there are pairs left in it.

        Stops visit pairs within the window. Those of packed rows visit all pairs of their tiles, as a
        segment may begin, and leave the window, inside of a block.
        """
        assert self.ranges.window is not None
        tile = _divided(start, GRAIN) + n
        key = tile * GRAIN
        if self.ranges.has_segments:
            is_left = key < self.first(i, start) * self.block_k
            is_left &= key < start + self.ranges.num_sink_tokens
        else:
            is_left = self.first_query(i + 1) - 1 - key >= self.ranges.window
        return jnp.minimum(tile, self.key_blocks * self.block_k // GRAIN - 1), is_left

    @property
    def has_full(self) -> bool:
        """Whether a tile can be full."""
        window = self.ranges.window
        return window is None or window >= self.block_q + self.block_k - 1

    def is_full(self, distance):
        """Whether all of a regular tile is visible, whose first query is `distance` after its first key."""
        full = distance >= self.block_k - 1
        if self.ranges.window is not None:
            full &= distance + (self.block_q - 1) < self.ranges.window
        return full

    @property
    def partial_distances(self) -> tuple[int, ...]:
        """The distances of regular tiles that hide something."""
        found = set()
        for i in range(self.query_blocks):
            ends = range(self.first(i, 0), self.last(i) + 1)
            for blocks in (ends, reversed(ends)):  # full tiles are in the middle
                for j in blocks:
                    distance = self.first_query(i) - j * self.block_k
                    if self.is_full(distance):
                        break
                    found.add(distance)
        return tuple(sorted(found))

    def is_regular(self, stop: Stop, last_start):
        """Whether the distance tells which pairs to visit; `last_start` is of the block's last query.

        No segment begins in such a tile or after it, and none of its keys is a sink token of packed rows.
        """
        if not self.ranges.has_segments:
            return True
        return stop.j * self.block_k >= last_start + self.ranges.num_sink_tokens


def _divided(x, by: int) -> Any:
    """x // by of x ≥ 0. `lax.div`: the sign that `//` asks for cannot be lowered where no TPU is."""
    return x // by if isinstance(x, int) else jax.lax.div(x, by)


def _largest(x, y) -> Any:
    return max(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.maximum(x, y)


def _smallest(x, y) -> Any:
    return min(x, y) if isinstance(x, int) and isinstance(y, int) else jnp.minimum(x, y)


def tour_of(ranges: Ranges, T: int, S: int, block_q: int, block_k: int) -> Tour:
    """The tour in blocks of at most these sizes.

    Raises:
        ValueError: a size is no multiple of 128.
    """
    for name, size in (("queries", block_q), ("keys", block_k)):
        if size < GRAIN or size % GRAIN:
            raise ValueError(f"blocks: expected {name} in multiples of {GRAIN}, got {size}")
    return Tour(ranges, T, S, min(block_q, up(T)), min(block_k, up(S)))
