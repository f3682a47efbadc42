"""GPU kernel of the statistics of queries: one program per query block and head, as in the forward pass."""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sinkjax_kernels import varying
from sinkjax_kernels.flash import gpu_tiles as tiles
from sinkjax_kernels.flash.gpu_forward import BlockRows, QueryBlocks
from sinkjax_kernels.flash.gpu_spans import Spans
from sinkjax_kernels.flash.gpu_tiles import Static
from sinkjax_kernels.statistics.ranges import LOG2_E, NEVER


def sums_of_rows(static: Static, query, key, lse, starts):
    """Maximum of x, Σ w and Σ w ln w of each row, `[B, N, T]`.

    Args:
        lse: log-sum-exp in base 2 `[B, N, T]`.
        starts: where the segment of each query begins, `[1 or B, T]`, or None.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    tile = static.blocks.forward
    spans = Spans(static.ranges, T, S, tile)
    blocks = QueryBlocks(spans, N, K)
    pairs = static.ranges.pairs(T) * B * N
    return pl.pallas_call(
        partial(_kernel, static, blocks, H),
        grid=(spans.query_blocks, B * N),
        in_specs=[
            blocks.rows(H),
            blocks.keys(H),
            blocks.numbers(),
            blocks.of_tokens(starts),
        ],
        out_specs=[blocks.numbers()] * 3,
        out_shape=[varying.struct((B, N, T), jnp.float32, query, key, lse, starts)] * 3,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * H,
            transcendentals=pairs,
            bytes_accessed=(query.size + key.size) * query.dtype.itemsize + 16 * lse.size,
        ),
        name="sinkjax_statistics_rows",
        interpret=static.interpret,
    )(query, key, lse, starts)


def _kernel(static, blocks, width, q_ref, k_ref, lse_ref, starts_ref, *outs):
    bq, T = blocks.spans.tile.query, blocks.spans.queries
    i = blocks.number()
    first = i * bq
    query = static.queries(tiles.load_rows(q_ref, (), 0, bq, T - first, width))
    lse = tiles.load_numbers(lse_ref, (), 0, bq, T - first)[:, None]
    rows = BlockRows(static, blocks.spans, i, starts_ref)

    def absorb(n, sums, place):
        start, size, limit, where = place(n)
        scores, _ = static.scores(query, tiles.load_rows(k_ref, (), start, size, limit, width))
        logits = scores * static.unit
        if where is not None:
            logits = jnp.where(where, logits, -NEVER)
        log_weights = logits - lse
        weights = jnp.exp2(log_weights)
        top, mass, surprise = sums
        return (
            jnp.maximum(top, logits.max(1)),
            mass + weights.sum(1),
            surprise + (weights * log_weights).sum(1),
        )

    zero = jnp.zeros((bq,), jnp.float32)
    top, mass, surprise = rows.sweep(absorb, (zero - NEVER, zero, zero))
    inside = first + jnp.arange(bq) < T
    for ref, x in zip(outs, (top / LOG2_E, mass, surprise / LOG2_E), strict=True):
        plt.store(ref, x, mask=inside)
