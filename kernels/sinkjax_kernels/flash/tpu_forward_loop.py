"""Forward kernel of causal attention and wide windows: a loop over chunks of keys.

The block's diagonal comes first: it is static and needs no state. Then come the chunks of keys before it,
with a running maximum.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_chunks import Resident, Streamed
from sinkjax_kernels.flash.tpu_rows import Rows
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static, dot


def loop_kernel(static: Static, plan, names, *refs):
    """`names` are those of the references; `plan` is a `tpu_forward.Plan`."""
    ref = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    ranges, width, block = static.ranges, static.blocks.keys, plan.block
    has_top, is_packed = static.policy.has_top, ranges.has_segments
    size = math.gcd(static.blocks.rows, block)
    chunk = tiles.chunk_size(static, block)
    i = pl.program_id(2)
    first = i * block + plan.origin  # index of the first query
    lead = plan.origin - plan.base  # and of its key among those at hand
    here = i * block + lead
    (rows,) = Rows.of_step(static, 1, ref.sinks)
    starts = range(0, block, size)
    if is_packed:
        tiles.spread_once(ref.low, ref.lows)
    ref.scaled[...] = static.folded(ref.query[0])

    has_edge = is_packed or ranges.window is not None
    if is_packed:
        low, full = (ref.bounds[pl.program_id(0), n, i] for n in range(2))
        low, full, end = tiles.chunks_from(here, chunk, low, full)
    else:
        low, full, end = tiles.chunks_of(here, block, chunk, ranges.window)
    rest = lead % chunk  # keys between the last chunk and the block
    source = Resident(ref, here, chunk) if plan.resident else Streamed(ref, rest, chunk)
    source.expect(low, end)

    def score_of(row, load, where):
        """Scores of some rows; `where` gives their visible pairs from a shape, or is None."""
        score, _ = static.capped(dot(ref.scaled[row : row + size, :], load(), (1, 1)))
        return score if where is None else rows.hide(score, where(row, score.shape))

    def near(start):
        """Pairs of a chunk that are not hidden by the window or by segments."""
        if is_packed:
            return lambda row, shape: tiles.not_before(shape, start, ref.lows[row : row + size, :])
        return lambda row, shape: tiles.distances(shape, here + row - start, 0) < ranges.window

    def at_diagonal(start, is_partial):
        def where(row, shape):
            seen = tiles.seen(shape, row - start, None, 0)
            return seen & near(first + start)(row, shape) if is_packed else seen

        return where if is_partial or is_packed else None

    def diagonal(row):
        found = []
        for start, end, is_partial in tiles.key_pieces(row, size, 0, None, width):
            load, value = source.near(start, end - start)
            found.append((score_of(row, load, at_diagonal(start, is_partial)), value))
        return found

    def begin(row, found):
        at, scores = slice(row, row + size), [score for score, _ in found]
        top: Any = rows.top(scores)
        total, ref.accs[at, :] = rows.gather(scores, [value() for _, value in found], top)
        if has_top:
            ref.tops[at, :], ref.totals[at, :] = jnp.broadcast_to(top, (size, GRAIN)), total

    tiles.staged(starts, diagonal, begin)

    def absorb(pieces):
        """Keys as (load keys, load values, who sees them or None)."""

        def scores(row):
            return [(score_of(row, load, where), value) for load, value, where in pieces]

        def weigh(row, found):
            at, scores = slice(row, row + size), [score for score, _ in found]
            top = rescale = None
            if has_top:
                old = ref.tops[at, :]  # the same in all its lanes: to spread a column costs more
                top = jnp.maximum(old, rows.largest(scores))
                rescale = jnp.exp2(old - top)
            total, acc = rows.gather(scores, [value() for _, value in found], top)
            if has_top:
                ref.tops[at, :] = top
                ref.totals[at, :] = rescale * ref.totals[at, :] + total
                ref.accs[at, :] = tiles.lanes(rescale, acc.shape[1]) * ref.accs[at, :] + acc
            else:
                ref.accs[at, :] += acc

        tiles.staged(starts, scores, weigh)

    def absorb_keys(pieces, start, number, is_edge):
        """Keys of which `pieces` gives some, from key `start` on."""
        cuts = [(x, min(width, number - x)) for x in range(0, number, width)]
        where = [near(start + x) if is_edge else None for x, _ in cuts]
        absorb([(*pieces(*cut), w) for cut, w in zip(cuts, where, strict=True)])

    def absorb_chunk(is_edge, j, _):
        absorb_keys(source.open(j, end), j * chunk, chunk, is_edge)

    if has_edge:
        jax.lax.fori_loop(low, full, partial(absorb_chunk, True), None)
    jax.lax.fori_loop(full, end, partial(absorb_chunk, False), None)
    if rest:
        absorb_keys(lambda x, n: source.near(x - rest, n), here - rest, rest, has_edge)
    if ranges.num_sink_tokens:

        def where(row, shape):
            if is_packed:
                return tiles.sinks_between(shape, first + row, ref.seen_by)
            return tiles.sinks_seen(shape, first + row, ranges, 0)

        sinks = lambda: tiles.tall(ref.sink_key[...]), lambda: tiles.tall(ref.sink_value[...])
        pl.when(first + block > ranges.window)(partial(absorb, [(*sinks, where)]))

    for row in starts:
        at = slice(row, row + size)
        state = (ref.tops[at, :], ref.totals[at, :]) if has_top else (None, None)
        rows.finish(ref.out, getattr(ref, "lse", None), at, *state, ref.accs[at, :])
