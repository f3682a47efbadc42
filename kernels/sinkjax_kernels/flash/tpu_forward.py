"""Forward kernels of softmax attention over ranges, for TPU: q, k, v → out, log-sum-exp.

Narrow windows: one grid step per query block with its whole span of keys as one overlapping block, so
that every tile's kind is static, all scores of a sub-block are there before its maximum is taken, and
nothing is rescaled. Causal attention and wide windows: the keys of a head stay in VMEM, the block's
diagonal is static, and a loop runs over the chunks before it with a running maximum.

Arrays are `[B, N, T, H]`, the log-sum-exp is `[B, N, 1, T]`: one number per query and head.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_policies import LOG2_E, MASKED
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static, dot


def forward(static: Static, query, key, value, sinks):
    """Output `[B, N, T, Hv]` and log-sum-exp `[B, N, 1, T]`; at least T keys.

    Args:
        sinks: sink logits `[N]` in float32, zeros where `static.has_sinks` is False.
    """
    B, N, T, H = query.shape
    K, Hv = key.shape[1], value.shape[-1]
    G = N // K
    ranges = static.ranges
    narrow, block = tiles.layout(ranges, T, static.blocks.query)
    blocks = -(-T // block)
    length = blocks * block
    query = tiles.pad_axis(query, length, 2)
    key, value = (tiles.pad_axis(x, length, 2) for x in (key, value))

    def queries(width):
        return pl.BlockSpec((None, None, block, width), lambda b, k, i, g: (b, k * G + g, i, 0))

    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    operands, scratch = [sinks, query, key, value], []
    if narrow:
        assert ranges.window is not None
        reach = tiles.reach(ranges.window)
        span = min(reach + block, length)
        kernel = partial(_span_kernel, static, G, block, blocks)

        def keys(width):  # overlapping blocks: Element makes the index count keys
            return pl.BlockSpec(
                (None, None, pl.Element(span), pl.Element(width)),
                lambda b, k, i, g: (b, k, tiles.span_start(i * block - reach), 0),
            )

        specs = [whole, queries(H), keys(H), keys(Hv)]
        if ranges.num_sink_tokens:
            operands += [key, value]
            specs += [
                pl.BlockSpec((None, None, GRAIN, w), lambda b, k, i, g: (b, k, 0, 0))
                for w in (H, Hv)
            ]
    else:
        kernel = partial(_loop_kernel, static, G, block)
        specs = [whole, queries(H)] + [
            pl.BlockSpec((None, None, length, w), lambda b, k, i, g: (b, k, 0, 0)) for w in (H, Hv)
        ]
        scratch = [
            pltpu.VMEM((block, H), query.dtype),
            pltpu.VMEM((block, GRAIN), jnp.float32),
            pltpu.VMEM((block, GRAIN), jnp.float32),
            pltpu.VMEM((block, Hv), jnp.float32),
        ]
    pairs = ranges.pairs(T) * B * N
    item = query.dtype.itemsize
    out, lse = pl.pallas_call(
        kernel,
        grid=(B, K, blocks, G),
        in_specs=specs,
        out_specs=[
            queries(Hv),
            pl.BlockSpec((None, None, 1, block), lambda b, k, i, g: (b, k * G + g, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, N, length, Hv), query.dtype),
            jax.ShapeDtypeStruct((B, N, 1, length), jnp.float32),
        ],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (H + Hv),
            transcendentals=pairs,
            bytes_accessed=(query.size + B * N * length * Hv + key.size + value.size) * item,
        ),
        name="sinkjax_flash_forward",
        interpret=static.interpret,
    )(*operands)
    return out[:, :, :T], lse[..., :T]


def _sink(static: Static, G: int, sinks_ref):
    """The sink logit of this head in base 2, or None."""
    if not static.has_sinks:
        return None
    return sinks_ref[pl.program_id(1) * G + pl.program_id(3)] * LOG2_E


def _over_lanes(combine, parts):
    """Elementwise over 128-lane columns of all parts: one reduction across lanes is left to do."""
    columns = [part[:, x : x + GRAIN] for part in parts for x in range(0, part.shape[1], GRAIN)]
    return functools.reduce(combine, columns)


def _row_max(parts):
    return _over_lanes(jnp.maximum, parts).max(axis=1, keepdims=True)


def _gather(static: Static, scores, values, top):
    """Sum of exp2(score − top) over the keys, and of it times the values.

    The sum is 128 columns: partial sums that are left to add, or with `wide_matmuls` the same number.
    """
    terms = [jnp.exp2(score - tiles.lanes(top, score.shape[1])) for score in scores]
    if not static.blocks.wide_matmuls:
        total = _over_lanes(jnp.add, terms)
        return total, _sum_of_products(terms, values)
    ones = [jnp.ones((v.shape[0], GRAIN), v.dtype) for v in values]
    values = [tiles.join([one, v], 1) for one, v in zip(ones, values, strict=True)]
    both = _sum_of_products(terms, values)
    return both[:, :GRAIN], both[:, GRAIN:]


def _sum_of_products(terms, values):
    products = [dot(p.astype(v.dtype), v, (1, 0)) for p, v in zip(terms, values, strict=True)]
    return functools.reduce(jnp.add, products)


def _finish(static: Static, out_ref, lse_ref, at, top, total, sink, acc):
    """Divide by the denominator, and turn its logarithm from a column into a compact row."""
    if not static.blocks.wide_matmuls:
        total = total.sum(axis=1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp2(sink - top)
    out_ref[at, :] = (acc / tiles.lanes(total, acc.shape[1])).astype(out_ref.dtype)
    lse = (top + jnp.log2(total)) * (1 / LOG2_E)
    lse_ref[:, at] = jnp.broadcast_to(lse, (lse.shape[0], GRAIN)).T[:1]


def _span_kernel(static, G, block, blocks, sinks_ref, q_ref, k_ref, v_ref, *rest):
    """A query block with its whole window; the first ones, whose window is cut short, are unrolled too."""
    *sink_refs, out_ref, lse_ref = rest
    ranges, width = static.ranges, static.blocks.keys
    window, reach = ranges.window, tiles.reach(ranges.window)
    rows = math.gcd(static.blocks.rows, block)
    i = pl.program_id(2)
    sink = _sink(static, G, sinks_ref)

    def body(before: int, first):
        """`before` keys of the span lie before the block; `first` is its first query."""

        def scores(row):
            query = static.folded(q_ref[row : row + rows, :])
            found = []
            for start, end, is_partial in tiles.key_pieces(row, rows, -before, window, width):
                at = slice(before + start, before + end)
                score, _ = static.capped(dot(query, k_ref[at, :], (1, 1)))
                if is_partial:
                    where = tiles.seen(score.shape, row - start, window, 0)
                    score = jnp.where(where, score, MASKED)
                found.append((score, v_ref, at))
            if sink_refs and not (isinstance(first, int) and first + row + rows <= window):
                score, _ = static.capped(dot(query, sink_refs[0][...], (1, 1)))
                where = tiles.sinks_seen(score.shape, first + row, ranges, 0)
                found.append((jnp.where(where, score, MASKED), sink_refs[1], slice(None)))
            return found

        def weigh(row, found):
            top = _row_max([score for score, _, _ in found])
            if sink is not None:
                top = jnp.maximum(top, sink)
            values = [ref[at, :] for _, ref, at in found]
            total, acc = _gather(static, [score for score, _, _ in found], values, top)
            at = slice(row, row + rows)
            _finish(static, out_ref, lse_ref, at, top, total, sink, acc)

        tiles.staged(range(0, block, rows), scores, weigh)

    short = min(-(-reach // block), blocks)  # blocks whose span begins at key 0
    for n in range(short):
        pl.when(i == n)(partial(body, n * block, n * block))
    if blocks > short:
        pl.when(i >= short)(partial(body, reach, i * block))


def _loop_kernel(
    static, G, block, sinks_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, scaled, tops, totals, accs
):
    """The diagonal first, which needs no state, then every chunk of keys before it."""
    ranges, width = static.ranges, static.blocks.keys
    rows = math.gcd(static.blocks.rows, block)
    chunk = tiles.chunk_size(static, block)
    first = pl.program_id(2) * block
    sink = _sink(static, G, sinks_ref)
    starts = range(0, block, rows)
    scaled[...] = static.folded(q_ref[...])

    def score_at(row, start, size):
        keys = k_ref[pl.ds(start, size), :]
        return static.capped(dot(scaled[row : row + rows, :], keys, (1, 1)))[0]

    def values_at(start, size):
        return v_ref[pl.ds(start, size), :]

    def diagonal(row):
        found = []
        for start, end, is_partial in tiles.key_pieces(row, rows, 0, None, width):
            score = score_at(row, pl.multiple_of(first + start, GRAIN), end - start)
            if is_partial:
                score = jnp.where(tiles.seen(score.shape, row - start, None, 0), score, MASKED)
            found.append((score, start, end))
        return found

    def begin(row, found):
        at = slice(row, row + rows)
        top = _row_max([score for score, _, _ in found])
        if sink is not None:
            top = jnp.maximum(top, sink)
        values = [values_at(pl.multiple_of(first + x, GRAIN), y - x) for _, x, y in found]
        tops[at, :] = jnp.broadcast_to(top, (rows, GRAIN))
        totals[at, :], accs[at, :] = _gather(static, [score for score, _, _ in found], values, top)

    tiles.staged(starts, diagonal, begin)

    def absorb(start, size, where_of=None):
        """`size` keys from `start` on, all visible unless `where_of(row, first key, shape)` says which."""
        cuts = [(x, min(x + width, size)) for x in range(0, size, width)]

        def scores(row):
            found = []
            for x, y in cuts:
                at = pl.multiple_of(start + x, GRAIN)
                score = score_at(row, at, y - x)
                if where_of is not None:
                    score = jnp.where(where_of(row, at, score.shape), score, MASKED)
                found.append((score, at, y - x))
            return found

        def weigh(row, found):
            at = slice(row, row + rows)
            old = tops[at, :]  # the same in all its lanes: to spread a column costs more
            top = jnp.maximum(old, _row_max([score for score, _, _ in found]))
            rescale = jnp.exp2(old - top)
            values = [values_at(x, n) for _, x, n in found]
            total, acc = _gather(static, [score for score, _, _ in found], values, top)
            tops[at, :] = top
            totals[at, :] = rescale * totals[at, :] + total
            accs[at, :] = tiles.lanes(rescale, acc.shape[1]) * accs[at, :] + acc

        tiles.staged(starts, scores, weigh)

    low, full, end = chunks_of(first, block, chunk, ranges.window)

    def near(row, key, shape):
        return tiles.distances(shape, first + row - key, 0) < ranges.window

    if ranges.window is not None:
        jax.lax.fori_loop(low, full, lambda j, _: absorb(j * chunk, chunk, near), None)
    jax.lax.fori_loop(full, end, lambda j, _: absorb(j * chunk, chunk), None)
    if ranges.num_sink_tokens:

        @pl.when(first + block > ranges.window)
        def _():
            absorb(
                0,
                GRAIN,
                lambda row, key, shape: tiles.sinks_seen(shape, first + row, ranges, 0),
            )

    for row in starts:
        at = slice(row, row + rows)
        top = tops[at, :]
        if not static.blocks.wide_matmuls:
            top = top[:, :1]
        _finish(static, out_ref, lse_ref, at, top, totals[at, :], sink, accs[at, :])


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
