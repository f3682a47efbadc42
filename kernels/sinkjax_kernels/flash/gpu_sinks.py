"""What far queries add to the gradients of sink tokens, beyond the runs of `gpu_spans`.

Every later query sees a sink token: one program that walked them all would take as long as T. Programs
take a chunk of queries each and write partial sums, which are added in a fixed order: the result is
the same each time, and the work is that of one small tile per query block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import div, rem

from sinkjax_kernels import varying
from sinkjax_kernels.flash import gpu_backward as bwd
from sinkjax_kernels.flash import gpu_tiles as tiles
from sinkjax_kernels.flash.gpu_spans import Spans, up
from sinkjax_kernels.flash.gpu_tiles import Static, padded


def add_far_queries(
    static: Static, query, key, value, d_out, denominator, delta, starts, ends, grads
):
    """The gradients of keys and values, `grads`, with those of the far sink pairs; as `d_key_value`."""
    P, T = static.ranges.num_sink_tokens, query.shape[1]
    spans = Spans(static.ranges, T, value.shape[1], static.blocks.d_keys)
    if P == 0 or spans.far(0) >= spans.query_blocks:
        return grads
    parts = _partial_sums(static, spans, query, key, value, d_out, denominator, delta, starts)
    if starts is None:
        sums = (part.sum(1)[:, :, :P].swapaxes(1, 2) for part in parts)
        return [
            grad.at[:, :P].set((grad[:, :P] + more).astype(grad.dtype))
            for grad, more in zip(grads, sums, strict=True)
        ]
    sums = _sums_of_segments(parts, starts[:, :: spans.tile.query])
    return [
        (grad + _at_sink_tokens(total, starts, ends, spans)).astype(grad.dtype)
        for grad, total in zip(grads, sums, strict=True)
    ]


def _partial_sums(static, spans, query, key, value, d_out, denominator, delta, starts):
    """`[B, chunks, K, sink tokens in whole tiles, H and Hv]` in float32."""
    B, T, N, H = query.shape
    S, K, Hv = value.shape[1:]
    G, size = N // K, static.sink_tile
    sink_tiles = -(-static.ranges.num_sink_tokens // size)
    # The far queries of one block are of one segment; those of a chunk need not be.
    chunk = static.blocks.chunk if starts is None else 1
    chunks = -(-spans.query_blocks // chunk)

    def keys(width):
        def place(_, bk):
            return div(bk, K), 0, rem(bk, K), 0

        return pl.BlockSpec((None, up(S, size), None, padded(width)), place)

    def sums(width):
        def place(n, bk):
            return div(bk, K), div(n, sink_tiles), rem(bk, K), rem(n, sink_tiles), 0

        return pl.BlockSpec((None, None, None, size, padded(width)), place)

    group = bwd.GroupSpecs(spans, K, G)
    operands = (query, key, value, d_out, denominator, delta, starts)
    pairs = B * N * T * static.ranges.num_sink_tokens
    return pl.pallas_call(
        partial(_kernel, static, spans, (G, chunk, sink_tiles), (H, Hv)),
        grid=(chunks * sink_tiles, B * K),
        in_specs=[
            group.rows(H),
            keys(H),
            keys(Hv),
            group.rows(Hv),
            group.numbers(denominator),
            group.numbers(delta),
            group.of_tokens(starts),
        ],
        out_specs=[sums(H), sums(Hv)],
        out_shape=[
            varying.struct((B, chunks, K, sink_tiles * size, width), jnp.float32, operands)
            for width in (H, Hv)
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * 2 * (H + Hv),
            transcendentals=pairs,
            bytes_accessed=(query.size + d_out.size) * query.dtype.itemsize,
        ),
        name="sinkjax_flash_d_sink_tokens",
        interpret=static.interpret,
    )(*operands)


def _kernel(
    static, spans, counts, widths, q_ref, k_ref, v_ref, do_ref, denominator_ref, delta_ref,
    starts_ref, dk_ref, dv_ref,
):  # fmt: skip
    G, chunk, sink_tiles = counts
    bq, size, T = spans.tile.query, static.sink_tile, spans.queries
    n = pl.program_id(0)
    block = div(n, sink_tiles) * chunk
    start = 0 if starts_ref is None else starts_ref[block * bq]
    end = spans.sink_end(start)
    first = start + rem(n, sink_tiles) * size
    keys = tiles.load_rows(k_ref, (), first, size, end, widths[0])
    values = tiles.load_rows(v_ref, (), first, size, end, widths[1])
    key = (first + jnp.arange(size))[:, None]
    far = spans.far(key)
    low, high = far_blocks(spans, block, chunk, first)

    def head(g, carry):
        def visit(i, carry):
            where = (key < end) & (far <= i)
            if starts_ref is not None:
                where &= tiles.load_numbers(starts_ref, (), i * bq, bq, T)[None, :] <= key
            where = jnp.broadcast_to(where, (size, bq))
            rows = bwd.query_tile(static, q_ref, do_ref, g, i, spans, widths, True)
            numbers = bwd.row_numbers(denominator_ref, delta_ref, (g,), i * bq, bq, T)
            return bwd.add_tile(static, keys, values, rows, numbers, where, carry)

        return tiles.loop(low, high, visit, carry)

    sums = tuple(jnp.zeros((size, padded(width)), jnp.float32) for width in widths)
    d_keys, d_values = tiles.loop(0, G, head, sums)
    tiles.store_rows(dk_ref, d_keys * abs(static.scale), 0, size, widths[0])
    tiles.store_rows(dv_ref, d_values, 0, size, widths[1])


def far_blocks(spans: Spans, block, chunk: int, key):
    """Of the chunk's query blocks those that may see sink tokens from `key` on as far ones."""
    low = jnp.maximum(block, spans.far(key))
    high = jnp.minimum(block + chunk, spans.query_blocks)
    return low, jnp.maximum(low, high)


def _sums_of_segments(parts, starts):
    """Running sums over the query blocks of a segment, the last of which is all of it.

    `starts`: where the segment of each block's first query begins, `[1 or B, blocks]`.
    """
    begins = jnp.diff(starts, axis=1, prepend=-1) != 0
    begins = begins.reshape(*begins.shape, 1, 1, 1)

    def join(left, right):
        begun, sums = left
        begins, more = right
        return begun | begins, [
            jnp.where(begins, b, a + b) for a, b in zip(sums, more, strict=True)
        ]

    return jax.lax.associative_scan(join, (begins, list(parts)), axis=1)[1]


def _at_sink_tokens(total, starts, ends, spans: Spans):
    """`[B, S, K, H]`: the sums of each sink token, 0 for other keys. A gather: nothing is added twice.

    Args:
        total: running sums by query block, `[B, blocks, K, P, H]`.
    """
    P, bq = spans.ranges.num_sink_tokens, spans.tile.query
    index = jnp.arange(starts.shape[1], dtype=jnp.int32) - starts
    last = (ends - 1) // bq
    # Far queries are in blocks that begin inside the segment.
    is_summed = (index < P) & (jnp.take_along_axis(starts, last * bq, axis=1) == starts)
    rows = jax.vmap(lambda total, last, index: total[last, :, index])
    B = total.shape[0]
    last, index, is_summed = (
        jnp.broadcast_to(x, (B, x.shape[1])) for x in (last, jnp.minimum(index, P - 1), is_summed)
    )
    return jnp.where(is_summed[:, :, None, None], rows(total, last, index), 0)
