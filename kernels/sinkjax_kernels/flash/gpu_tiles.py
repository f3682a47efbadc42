"""What the forward and the backward GPU kernels share: scores, loads at ragged edges, masks, loops.

Kernels read the arrays as they are, `[B, T, N, H]`: a program takes the rows of one head by their
stride. A head size that is no power of two is widened by loads that give 0 beyond it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sinkjax_kernels.flash.gpu_blocks import Blocks
from sinkjax_kernels.flash.gpu_policies import LOG2_E, Policy, Powers
from sinkjax_kernels.flash.ranges import Ranges

LARGEST_SINK_TILE = 64


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything a compiled program depends on besides shapes."""

    ranges: Ranges
    policy: Policy
    scale: float
    soft_cap: float | None
    blocks: Blocks
    interpret: bool = False

    @property
    def sign(self) -> float:
        """Of the scale: queries are multiplied with it, so that `unit` is positive."""
        return 0.0 if self.scale == 0 else math.copysign(1.0, self.scale)

    @property
    def unit(self) -> float:
        """Base-2 logits are this times the scores."""
        if self.soft_cap is not None:
            return self.soft_cap * LOG2_E
        return abs(self.scale) * LOG2_E or 1.0

    @property
    def power(self) -> Powers:
        return Powers(self.unit, self.interpret)

    @property
    def sink_tile(self) -> int:
        """Sink tokens of a tile."""
        return min(LARGEST_SINK_TILE, max(16, power_of_2(self.ranges.num_sink_tokens)))

    def queries(self, query):
        """Queries as the scores want them."""
        return query if self.sign == 1 else query * jnp.asarray(self.sign, query.dtype)

    def scores(self, a, b):
        """Scores of rows a and columns b, and the slope of the soft cap or None."""
        product = self.dot(a, b, (1, 1))
        if self.soft_cap is None:
            return product, None
        squashed = jnp.tanh(product * (abs(self.scale) / self.soft_cap))
        return squashed, 1 - squashed * squashed

    def dot(self, a, b, contract: tuple[int, int] = (1, 0)):
        """A product in float32, of float32 operands too; b's dtype is that of the matrix units."""
        a = a.astype(b.dtype)
        precision = None
        if b.dtype == jnp.float32:
            # Three TF32 products are as good as float32; interpreters on CPU know the word HIGHEST.
            three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = jax.lax.Precision.HIGHEST if self.interpret else three
        return jax.lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


def power_of_2(x: int) -> int:
    """The smallest power of two that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


def padded(head: int) -> int:
    """The head size that a tile has room for."""
    return max(16, power_of_2(head))


def load_rows(ref, at: tuple, start, rows: int, limit, width: int):
    """`[rows, padded width]` from row `start` on; 0 beyond `limit` (None: no row is) and `width`.

    `at` are the indices of the axes between rows and columns.
    """
    room = ref.shape[-1]
    mask = None
    if limit is not None:
        mask = (start + jnp.arange(rows) < limit)[:, None]
    if width < room:
        inside = (jnp.arange(room) < width)[None, :]
        mask = inside if mask is None else mask & inside
    tile = ref.at[(pl.ds(start, rows), *at, slice(None))]
    if mask is None:
        return plt.load(tile)
    return plt.load(tile, mask=mask, other=0)


def load_numbers(ref, at: tuple, start, rows: int, limit):
    """`[rows]` numbers from `start` on; 0 beyond `limit` (None: none is)."""
    if limit is None:
        return ref[(*at, pl.ds(start, rows))]
    mask = start + jnp.arange(rows) < limit
    return plt.load(ref.at[(*at, pl.ds(start, rows))], mask=mask, other=0)


def store_rows(ref, tile, start, limit, width: int) -> None:
    """The block's rows, of which the first is row `start` of the array."""
    mask = (start + jnp.arange(tile.shape[0]) < limit)[:, None]
    mask &= (jnp.arange(tile.shape[1]) < width)[None, :]
    plt.store(ref, tile.astype(ref.dtype), mask=mask)


def seen(ranges: Ranges, query, key, start):
    """Visible pairs of queries and keys at these key indices; `start` of the queries' segments or None."""
    where = key <= query
    if ranges.window is not None:
        near = query - key < ranges.window
        if ranges.num_sink_tokens:
            sinks = ranges.num_sink_tokens
            near |= key < (sinks if start is None else start + sinks)
        where &= near
    return where if start is None else where & (key >= start)


def loop(start, stop, body, carry):
    """`body(index, carry)` for each index, as a loop that the compiler pipelines."""
    return jax.lax.fori_loop(jnp.int32(start), jnp.int32(stop), body, carry)


def along_run(spans, run, edges: tuple[bool, bool], visit, carry):
    """`visit(index, is_partial, carry)` of each block of a run; full blocks have a loop of their own.

    `edges`: whether there can be partial blocks before the full ones, and after them.
    """
    low, full_low, full_high, high = run

    def part(start, stop, is_partial, carry):
        return loop(start, stop, lambda n, carry: visit(n, is_partial, carry), carry)

    if not spans.has_full:
        return part(low, high, True, carry)
    if edges[0]:
        carry = part(low, full_low, True, carry)
    carry = part(full_low, full_high, False, carry)
    return part(full_high, high, True, carry) if edges[1] else carry
