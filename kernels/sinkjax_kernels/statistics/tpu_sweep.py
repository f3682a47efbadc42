"""The TPU kernel of attention statistics: one tour over the visible tiles of each head.

Sums of rows stay in VMEM as 128 columns that are added up when the query block ends, sums of keys as
one row of all keys that stays while the head lasts.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels import varying
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_tiles import GRAIN, dot
from sinkjax_kernels.statistics.ranges import LOG2_E, NEVER
from sinkjax_kernels.statistics.tpu_tour import Tour

MOST_BODIES = 3
"""Partial tiles that the program unrolls: aligned blocks have two or three kinds."""


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything a compiled program depends on besides shapes."""

    tour: Tour
    soft_cap: float | None
    interpret: Any

    def capped(self, scores):
        """Base-2 logits."""
        return scores if self.soft_cap is None else jnp.tanh(scores) * (self.soft_cap * LOG2_E)


def sweep(static: Static, query, key, lse, starts, with_rows: bool):
    """Maximum of x, Σ w and Σ w ln w of each row (or nothing) `[B, N, T]`; Σ w of each key `[B, N, S]`.

    Args:
        query, key: `[B, N, T, H]`, `[B, K, S, H]`, whole blocks; their products are the logits in base
            2, or the argument of tanh.
        lse: log-sum-exp in base 2 `[B, N, T]`, very large for rows of padding.
        starts: first index of the segment of each query `[1 or B, T]`, or None for one segment.
        with_rows: whether the sums of rows are wanted.
    """
    tour = static.tour
    (B, N, T, H), (K, S) = query.shape, key.shape[1:3]
    G, block_q, block_k = N // K, tour.block_q, tour.block_k
    tables, operands = [], [lse[:, :, None], query, key]

    def at_stop(spot):
        def index(b, n, row, step, *tables):
            start_of = partial(_start, tour, tables, b, 0)
            return spot(b, n, tour.stop(row, step, start_of), start_of)

        return index

    def sinks_at(t):
        def spot(b, n, stop, start_of):
            return b, jax.lax.div(n, G), tour.sink_tile(t, stop.i, start_of(stop.i))[0], 0

        return pl.BlockSpec((None, None, GRAIN, H), at_stop(spot))

    row = pl.BlockSpec((None, None, 1, block_q), at_stop(lambda b, n, stop, _: (b, n, 0, stop.i)))
    specs = [
        row,
        pl.BlockSpec((None, None, block_q, H), at_stop(lambda b, n, stop, _: (b, n, stop.i, 0))),
        pl.BlockSpec(
            (None, None, block_k, H),
            at_stop(lambda b, n, stop, _: (b, jax.lax.div(n, G), stop.j, 0)),
        ),
    ]
    specs += [sinks_at(t) for t in range(tour.sink_tiles)]
    operands += [key] * tour.sink_tiles
    scratch = [pltpu.VMEM((block_q, GRAIN), jnp.float32)]
    if starts is not None:
        starts = jnp.broadcast_to(starts, (B, starts.shape[1]))
        starts = jnp.pad(starts, ((0, 0), (0, T - starts.shape[1])), mode="edge")
        ends = starts.reshape(B, -1, block_q)[:, :, (0, -1)]
        tables = [ends.reshape(-1)]
        operands.append(starts.astype(jnp.float32)[:, None])  # exact below 2^24
        specs.append(
            pl.BlockSpec((None, 1, block_q), at_stop(lambda b, n, stop, _: (b, 0, stop.i)))
        )
        scratch.append(pltpu.VMEM((block_q, GRAIN), jnp.int32))
    per_row = 3 if with_rows else 0
    operands = varying.alike((*tables, *operands))
    pairs = B * N * tour.pairs
    *rows, keys = pl.pallas_call(
        partial(_kernel, static, with_rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(B, N, *tour.grid),
            in_specs=specs,
            out_specs=[row] * per_row
            + [pl.BlockSpec((None, None, 1, S), lambda b, n, *_: (b, n, 0, 0))],
            scratch_shapes=scratch + [pltpu.VMEM((block_q, GRAIN), jnp.float32)] * per_row,
        ),
        out_shape=[varying.struct((B, N, 1, T), jnp.float32, *operands)] * per_row
        + [varying.struct((B, N, 1, S), jnp.float32, *operands)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=(query.size + pairs // block_q * H) * query.dtype.itemsize
            + 4 * B * N * (T * (1 + per_row) + S),
        ),
        name="sinkjax_statistics",
        interpret=static.interpret,
    )(*operands)
    return [x[:, :, 0] for x in rows], keys[:, :, 0]


def _start(tour: Tour, tables, b, end: int, i):
    """First index of the segment of the first (`end` 0) or last (1) query of a block."""
    return tables[0][(b * tour.query_blocks + i) * 2 + end] if tables else 0


def _kernel(static, with_rows, *refs):
    tour, ranges = static.tour, static.tour.ranges
    refs = list(refs)
    tables = [refs.pop(0)] if ranges.has_segments else []
    lse_ref, q_ref, k_ref = refs[:3]
    sink_refs, refs = refs[3 : 3 + tour.sink_tiles], refs[3 + tour.sink_tiles :]
    start_ref = refs.pop(0) if ranges.has_segments else None
    outs = [refs.pop(0) for _ in range(3 if with_rows else 0)]
    keys_ref, lse = refs[:2]
    starts, sums = (refs[2], refs[3:]) if ranges.has_segments else (None, refs[2:])

    b, row, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    stop = tour.stop(row, step, partial(_start, tour, tables, b, 0))
    start, last_start = (_start(tour, tables, b, end, stop.i) for end in (0, 1))
    blocks = range(0, tour.block_q, GRAIN)

    @pl.when((row == 0) & (step == 0))
    def _():
        keys_ref[...] = jnp.zeros_like(keys_ref)

    def absorb(tile_ref, first_key, piece):
        """All queries of the block against one tile of keys.

        `piece(row, column)` is what to do with 128 × 128 pairs: False for nothing, None if all are
        visible, or those that are.
        """
        columns = range(0, tile_ref.shape[0], GRAIN)
        totals = {c: [] for c in columns}

        def scores(row):
            found = {c: piece(row, c) for c in columns}
            found = {c: where for c, where in found.items() if where is not False}
            if not found:
                return {}
            low, high = min(found), max(found) + GRAIN
            score = static.capped(dot(q_ref[row : row + GRAIN, :], tile_ref[low:high, :], (1, 1)))
            parts = {c: score[:, c - low : c - low + GRAIN] for c in found}
            return {
                c: part if found[c] is None else jnp.where(found[c], part, -NEVER)
                for c, part in parts.items()
            }

        def weigh(row, found):
            at = slice(row, row + GRAIN)
            lists = [], [], []
            for c, score in found.items():
                log_weights = score - lse[at, :]
                weights = jnp.exp2(log_weights)
                totals[c].append(weights.reshape(GRAIN // 8, 8, GRAIN).sum(0))
                for terms, x in zip(lists, (score, weights, weights * log_weights), strict=True):
                    terms.append(x)
            for ref, combine, terms in zip(
                sums, (jnp.maximum, jnp.add, jnp.add), lists, strict=False
            ):
                ref[at, :] = functools.reduce(combine, terms, ref[at, :])

        tiles.staged(blocks, scores, weigh)
        for c, parts in totals.items():
            if parts:
                at = pl.ds(pl.multiple_of(first_key + c, GRAIN), GRAIN)
                keys_ref[:, at] += functools.reduce(jnp.add, parts).sum(0, keepdims=True)

    def by_position(first_key, row, column):
        """Pairs to visit of any tile."""
        shape, key = (GRAIN, GRAIN), first_key + column
        distance = tiles.distances(shape, tour.first_query(stop.i) + row - key, 0)
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + key
        begin = 0 if starts is None else starts[row : row + GRAIN, :]
        where = distance >= 0
        if ranges.window is not None:
            near = distance < ranges.window
            if ranges.has_segments and ranges.num_sink_tokens:
                near |= key < begin + ranges.num_sink_tokens
            where &= near
        return where & (key >= begin) if ranges.has_segments else where

    def beyond_window(first_key, row, column):
        """Pairs with sink tokens that have left the window."""
        first = tour.first_query(stop.i) + row - first_key
        far = tiles.distances((GRAIN, GRAIN), first, 0) >= ranges.window
        key = jax.lax.broadcasted_iota(jnp.int32, (GRAIN, GRAIN), 1) + first_key
        return far & (key < ranges.num_sink_tokens)

    def by_distance(distance, row, column):
        """Pairs to visit of a tile whose first query is so far from its first key."""
        distance += row - column
        match tiles.tile_kind(distance, ranges.window):
            case "empty":
                return False
            case "full":
                return None
        return tiles.seen((GRAIN, GRAIN), distance, ranges.window, 0)

    @pl.when(stop.is_first)
    def _():
        for c in blocks:
            at = slice(c, c + GRAIN)
            lse[at, :] = jnp.broadcast_to(lse_ref[:, at], (GRAIN, GRAIN)).T
            if starts is not None and start_ref is not None:
                wide = jnp.broadcast_to(start_ref[:, at], (GRAIN, GRAIN)).T
                starts[at, :] = wide.astype(jnp.int32)
        for ref, empty in zip(sums, (-NEVER, 0, 0), strict=False):
            ref[...] = jnp.full_like(ref, empty)

    for n, sink_ref in enumerate(sink_refs):
        tile, is_left = tour.sink_tile(n, stop.i, start)
        first_key = tile * GRAIN
        piece = by_position if ranges.has_segments else beyond_window
        pl.when(stop.is_first & is_left)(
            partial(absorb, sink_ref, first_key, partial(piece, first_key))
        )

    first_key = stop.j * tour.block_k
    distance = tour.first_query(stop.i) - first_key
    is_short = len(tour.partial_distances) <= MOST_BODIES
    is_regular = stop.is_visited & tour.is_regular(stop, last_start)
    is_left = stop.is_visited
    if tour.has_full:
        is_full = is_regular & tour.is_full(distance)
        pl.when(is_full)(partial(absorb, k_ref, first_key, lambda row, column: None))
        is_left &= ~is_full
    if is_short:
        for known in tour.partial_distances:
            is_known = is_regular & (distance == known)
            pl.when(is_known)(partial(absorb, k_ref, first_key, partial(by_distance, known)))
            is_left &= ~is_known
    if ranges.has_segments or not is_short:
        pl.when(is_left)(partial(absorb, k_ref, first_key, partial(by_position, first_key)))

    if with_rows:

        @pl.when(stop.is_last)
        def _():
            for ref, out, reduce, unit in zip(
                sums, outs, (jnp.max, jnp.sum, jnp.sum), (1 / LOG2_E, 1, 1 / LOG2_E), strict=True
            ):
                for c in blocks:
                    at = slice(c, c + GRAIN)
                    out[:, at] = reduce(ref[at, :].T, axis=0, keepdims=True) * unit
