"""GPU kernels of the statistics of keys: one program per key block and head sums over the queries.

Far queries, which see a sink token only because it is one, have programs of their own (as in
`flash.gpu_sinks`): partial sums of some query blocks each, added up in a fixed order.
"""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import div, rem

from sinkjax_kernels import varying
from sinkjax_kernels.flash import gpu_sinks
from sinkjax_kernels.flash import gpu_tiles as tiles
from sinkjax_kernels.flash.gpu_spans import Spans, up
from sinkjax_kernels.flash.gpu_tiles import Static, padded
from sinkjax_kernels.statistics.ranges import NEVER


def sums_of_keys(static: Static, query, key, lse, factor, starts, ends):
    """Σ w and Σ w · factor over the queries that see each key, `[B, N, S]`.

    Args:
        lse: log-sum-exp in base 2 `[B, N, T]`.
        factor: what a row's weights are multiplied with, `[B, N, T]`.
        starts, ends: where the segment of each token begins and ends, `[1 or B, T]`, or None.
    """
    P, T = static.ranges.num_sink_tokens, query.shape[1]
    spans = Spans(static.ranges, T, key.shape[1], static.blocks.d_keys)
    sums = _near(static, spans, query, key, lse, factor, starts, ends)
    if P == 0 or spans.far(0) >= spans.query_blocks:
        return sums
    parts = _far(static, spans, query, key, lse, factor, starts)  # [B, chunks, N, sink tokens]
    if starts is None:
        return [
            x.at[:, :, :P].add(part.sum(1)[:, :, :P]) for x, part in zip(sums, parts, strict=True)
        ]
    totals = gpu_sinks._sums_of_segments(
        [part[..., None] for part in parts], starts[:, :: spans.tile.query]
    )
    return [
        x + gpu_sinks._at_sink_tokens(total, starts, ends, spans)[..., 0].swapaxes(1, 2)
        for x, total in zip(sums, totals, strict=True)
    ]


class _Specs:
    """What a program of a grid (something, batch row and query head) reads of its head."""

    def __init__(self, spans: Spans, N: int, K: int):
        self.spans, self.N, self.G = spans, N, N // K
        self.length = up(spans.queries, spans.tile.query)

    def heads(self, bn):
        """Batch row, query head and key head."""
        n = rem(bn, self.N)
        return div(bn, self.N), n, div(n, self.G)

    def all_queries(self, width: int):
        def place(_, bn):
            b, n, _ = self.heads(bn)
            return b, 0, n, 0

        return pl.BlockSpec((None, self.length, None, padded(width)), place)

    def all_keys(self, size: int, width: int):
        def place(_, bn):
            b, _, k = self.heads(bn)
            return b, 0, k, 0

        return pl.BlockSpec((None, up(self.spans.keys, size), None, padded(width)), place)

    def key_block(self, width: int):
        def place(j, bn):
            b, _, k = self.heads(bn)
            return b, j, k, 0

        return pl.BlockSpec((None, self.spans.tile.keys, None, padded(width)), place)

    def numbers(self):
        def place(_, bn):
            b, n, _ = self.heads(bn)
            return b, n, 0

        return pl.BlockSpec((None, None, self.length), place)

    def of_tokens(self, x):
        if x is None:
            return None
        of_row = x.shape[0] > 1

        def place(_, bn):
            return self.heads(bn)[0] if of_row else 0, 0

        return pl.BlockSpec((None, self.length), place)


def _near(static, spans, query, key, lse, factor, starts, ends):
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    tile, specs = spans.tile, _Specs(spans, N, K)
    operands = (query, key, lse, factor, starts, ends)
    pairs = static.ranges.pairs(T) * B * N

    def place(j, bn):
        b, n, _ = specs.heads(bn)
        return b, n, j

    return pl.pallas_call(
        partial(_near_kernel, static, spans, H),
        grid=(spans.key_blocks, B * N),
        in_specs=[
            specs.all_queries(H),
            specs.key_block(H),
            specs.numbers(),
            specs.numbers(),
            specs.of_tokens(starts),
            specs.of_tokens(ends),
        ],
        out_specs=[pl.BlockSpec((None, None, tile.keys), place)] * 2,
        out_shape=[varying.struct((B, N, S), jnp.float32, operands)] * 2,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=(query.size + key.size) * query.dtype.itemsize
            + 8 * (lse.size + B * N * S),
        ),
        name="sinkjax_statistics_keys",
        interpret=static.interpret,
    )(*operands)


def _near_kernel(
    static, spans, width, q_ref, k_ref, lse_ref, factor_ref, starts_ref, ends_ref, *outs
):
    bq, bk, T, S = spans.tile.query, spans.tile.keys, spans.queries, spans.keys
    j = pl.program_id(0)
    first = j * bk
    keys = tiles.load_rows(k_ref, (), 0, bk, S - first, width)
    key = (first + jnp.arange(bk))[:, None]
    edges = None, None
    if ends_ref is not None:
        edges = ends_ref[first], ends_ref[jnp.minimum(first + bk, S) - 1]

    def visit(i, is_partial, sums):
        where = None
        if is_partial:
            index = (i * bq + jnp.arange(bq))[None, :]
            starts = None
            if starts_ref is not None:
                starts = tiles.load_numbers(starts_ref, (), i * bq, bq, T)[None, :]
            where = tiles.seen(spans.ranges, spans.ranges.offset + index, key, starts)
            where &= index < T
        limit = T if is_partial else None
        return _add_tile(
            static, keys, q_ref, lse_ref, factor_ref, i, spans, width, limit, where, sums
        )

    zero = jnp.zeros((bk,), jnp.float32)
    run = spans.of_key_block(j, *edges)
    sums = tiles.along_run(spans, run, spans.key_edges, visit, (zero, zero))
    for ref, x in zip(outs, sums, strict=True):
        plt.store(ref, x, mask=first + jnp.arange(bk) < S)


def _add_tile(
    static, keys, q_ref, lse_ref, factor_ref, i, spans, width, limit, where, sums
):  # fmt: skip
    """The sums with query block i, a tile of keys by queries."""
    bq, T = spans.tile.query, spans.queries
    query = static.queries(tiles.load_rows(q_ref, (), i * bq, bq, limit, width))
    lse, factor = (
        tiles.load_numbers(ref, (), i * bq, bq, T)[None, :] for ref in (lse_ref, factor_ref)
    )
    scores, _ = static.scores(keys, query)
    logits = scores * static.unit
    if where is not None:
        logits = jnp.where(where, logits, -NEVER)
    weights = jnp.exp2(logits - lse)
    return sums[0] + weights.sum(1), sums[1] + (weights * factor).sum(1)


def _far(static, spans, query, key, lse, factor, starts):
    """`[B, chunks, N, sink tokens in whole tiles]` of both sums."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    size, specs = static.sink_tile, _Specs(spans, N, K)
    sink_tiles = -(-static.ranges.num_sink_tokens // size)
    chunk = (
        static.blocks.chunk if starts is None else 1
    )  # a block is of one segment, as far as it is far
    chunks = -(-spans.query_blocks // chunk)
    operands = (query, key, lse, factor, starts)
    pairs = B * N * T * static.ranges.num_sink_tokens

    def place(m, bn):
        b, n, _ = specs.heads(bn)
        return b, div(m, sink_tiles), n, rem(m, sink_tiles)

    return pl.pallas_call(
        partial(_far_kernel, static, spans, chunk, sink_tiles, H),
        grid=(chunks * sink_tiles, B * N),
        in_specs=[
            specs.all_queries(H),
            specs.all_keys(size, H),
            specs.numbers(),
            specs.numbers(),
            specs.of_tokens(starts),
        ],
        out_specs=[pl.BlockSpec((None, None, None, size), place)] * 2,
        out_shape=[varying.struct((B, chunks, N, sink_tiles * size), jnp.float32, operands)] * 2,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=query.size * query.dtype.itemsize + 8 * lse.size,
        ),
        name="sinkjax_statistics_sink_tokens",
        interpret=static.interpret,
    )(*operands)


def _far_kernel(
    static, spans, chunk, sink_tiles, width, q_ref, k_ref, lse_ref, factor_ref, starts_ref, *outs
):
    bq, size, T = spans.tile.query, static.sink_tile, spans.queries
    m = pl.program_id(0)
    block = div(m, sink_tiles) * chunk
    start = 0 if starts_ref is None else starts_ref[block * bq]
    end = start + static.ranges.num_sink_tokens
    first = start + rem(m, sink_tiles) * size
    keys = tiles.load_rows(k_ref, (), first, size, end, width)
    key = (first + jnp.arange(size))[:, None]
    far = spans.far(key)

    def visit(i, sums):
        index = (i * bq + jnp.arange(bq))[None, :]
        where = (key < end) & (far <= i) & (index < T)
        if starts_ref is not None:
            where &= tiles.load_numbers(starts_ref, (), i * bq, bq, T)[None, :] <= key
        return _add_tile(static, keys, q_ref, lse_ref, factor_ref, i, spans, width, T, where, sums)

    zero = jnp.zeros((size,), jnp.float32)
    low, high = gpu_sinks.far_blocks(spans, block, chunk, first)
    for ref, x in zip(outs, tiles.loop(low, high, visit, (zero, zero)), strict=True):
        plt.store(ref, x)
