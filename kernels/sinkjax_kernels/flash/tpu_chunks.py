"""Where the looping forward kernel finds its keys: in VMEM, or in HBM when those of a head do not fit.

A piece is a pair of functions that load some keys and their values, called where they are needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels.flash.tpu_tiles import GRAIN

Piece = tuple[Callable[[], Any], Callable[[], Any]]


def _piece(key, value, *at) -> Piece:
    return lambda: key[*at, :], lambda: value[*at, :]


class Resident:
    """All keys of a head.

    Args:
        here: the key of the block's first query.
        chunk: keys of a chunk.
    """

    def __init__(self, ref, here, chunk: int):
        self.ref, self.here, self.chunk = ref, here, chunk

    def _at(self, start, number: int) -> Piece:
        return _piece(self.ref.key, self.ref.value, pl.ds(pl.multiple_of(start, GRAIN), number))

    def near(self, start: int, number: int) -> Piece:
        """Keys from `start` on, counted from that of the block's first query."""
        return self._at(self.here + start, number)

    def expect(self, low, end) -> None:
        """Says that the chunks [low, end) come next."""

    def open(self, j, end) -> Callable[[int, int], Piece]:
        """Chunk j, as a function of the first key and the number of a piece of it."""
        return lambda x, number: self._at(j * self.chunk + x, number)


class Streamed:
    """The keys around a block's diagonal; chunks are copied while the one before is in use.

    Args:
        rest: keys before the block that are no whole chunk; they come with the diagonal.
    """

    def __init__(self, ref, rest: int, chunk: int):
        self.ref, self.rest, self.chunk = ref, rest, chunk
        self.head = pl.program_id(0), pl.program_id(1)

    def near(self, start: int, number: int) -> Piece:
        at = slice(self.rest + start, self.rest + start + number)
        return _piece(self.ref.near_key, self.ref.near_value, at)

    def _copies(self, j):
        ref, slot = self.ref, jax.lax.rem(j, 2)
        at = (*self.head, pl.ds(pl.multiple_of(j * self.chunk, GRAIN), self.chunk))
        pairs = (ref.key, ref.chunk_key), (ref.value, ref.chunk_value)
        return [
            pltpu.make_async_copy(source.at[at], target.at[slot], ref.arrived.at[n, slot])
            for n, (source, target) in enumerate(pairs)
        ]

    def _fetch(self, j) -> None:
        for copy in self._copies(j):
            copy.start()

    def expect(self, low, end) -> None:
        pl.when(low < end)(partial(self._fetch, low))

    def open(self, j, end) -> Callable[[int, int], Piece]:
        pl.when(j + 1 < end)(partial(self._fetch, j + 1))
        for copy in self._copies(j):
            copy.wait()
        slot, ref = jax.lax.rem(j, 2), self.ref
        return lambda x, n: _piece(ref.chunk_key, ref.chunk_value, slot, slice(x, x + n))
