"""Forward kernel of narrow windows: a query block with its whole span of keys.

Every tile's kind is static, all scores of a sub-block are there before its maximum is taken, and nothing
is rescaled. The first blocks, whose window is cut short, are unrolled too.
"""

import math
from functools import partial
from types import SimpleNamespace

from jax.experimental import pallas as pl

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_rows import Rows
from sinkjax_kernels.flash.tpu_tiles import Static, dot


def span_kernel(static: Static, plan, names, *refs):
    """`names` are those of the references; `plan` is a `tpu_forward.Plan`."""
    ref = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    ranges, width, block = static.ranges, static.blocks.keys, plan.block
    assert ranges.window is not None
    window, reach = ranges.window, tiles.reach(ranges.window)
    size = math.gcd(static.blocks.rows, block)
    i = pl.program_id(2)
    every = Rows.of_step(static, plan.heads, ref.sinks)
    is_packed = ranges.has_segments
    lse_ref = getattr(ref, "lse", None)
    if is_packed:
        tiles.spread_once(ref.low, ref.lows)

    def body(before: int, first):
        """`before` keys of the span lie before the block; `first` is the index of its first query."""

        def scores(item):
            row, rows = item
            query = static.folded(ref.query[rows.head, row : row + size, :])
            found = []
            for start, end, is_partial in tiles.key_pieces(row, size, -before, window, width):
                at = slice(before + start, before + end)
                score, _ = static.capped(dot(query, ref.key[at, :], (1, 1)))
                shape = (size, end - start)
                if is_packed:
                    low = ref.lows[row : row + size, :]
                    where = tiles.not_before(shape, first + start, low)
                    if end > row:
                        where &= tiles.seen(shape, row - start, None, 0)
                    score = rows.hide(score, where)
                elif is_partial:
                    score = rows.hide(score, tiles.seen(shape, row - start, window, 0))
                found.append((score, ref.value[at, :]))
            if ranges.num_sink_tokens and not (
                isinstance(first, int) and first + row + size <= window
            ):
                score, _ = static.capped(dot(query, tiles.tall(ref.sink_key[...]), (1, 1)))
                shape = (size, score.shape[1])
                if is_packed:
                    where = tiles.sinks_between(shape, first + row, ref.seen_by)
                else:
                    where = tiles.sinks_seen(shape, first + row, ranges, 0)
                found.append((rows.hide(score, where), tiles.tall(ref.sink_value[...])))
            return found

        def weigh(item, found):
            row, rows = item
            scores = [score for score, _ in found]
            top = rows.top(scores)
            total, acc = rows.gather(scores, [value for _, value in found], top)
            rows.finish(ref.out, lse_ref, slice(row, row + size), top, total, acc)

        items = [(row, rows) for row in range(0, block, size) for rows in every]
        tiles.staged(items, scores, weigh, ahead=2)

    firsts = range(plan.origin, plan.origin + block * plan.blocks, block)
    short = [first for first in firsts if first < reach]  # blocks whose span begins at key 0
    for n, first in enumerate(short):
        pl.when(i == n)(partial(body, first, first))
    if len(short) < plan.blocks:
        pl.when(i >= len(short))(partial(body, reach, plan.origin + i * block))
