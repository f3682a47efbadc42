"""Backward GPU kernels: the gradient of queries by query block, those of keys and values by key block.

Both recompute the scores and take weights and gradient of the logits from the policy. `gpu_sinks` adds
what far queries give to sink tokens.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import div, rem

from sinkjax_kernels import varying
from sinkjax_kernels.flash import gpu_forward as fwd
from sinkjax_kernels.flash import gpu_tiles as tiles
from sinkjax_kernels.flash.gpu_policies import LOG2_E
from sinkjax_kernels.flash.gpu_spans import Spans, up
from sinkjax_kernels.flash.gpu_tiles import Static, padded


def d_query(static: Static, query, key, value, d_out, denominator, delta, starts):
    """Gradient of the queries, `[B, T, N, H]`.

    Args:
        denominator, delta: `[B, N, T]`, logarithm of the denominator and D − dL; or None.
        starts: where the segment of each query begins, `[1 or B, T]`, or None.
    """
    B, T, N, H = query.shape
    S, K, Hv = value.shape[1:]
    tile = static.blocks.d_query
    spans = Spans(static.ranges, T, S, tile)
    blocks = fwd.QueryBlocks(spans, N, K)
    numbers = None if delta is None else blocks.numbers()
    operands = (query, key, value, d_out, denominator, delta, starts)
    pairs = static.ranges.pairs(T) * B * N
    return pl.pallas_call(
        partial(_d_query_kernel, static, blocks, (H, Hv)),
        grid=(spans.query_blocks, B * N),
        in_specs=[
            blocks.rows(H),
            blocks.keys(H),
            blocks.keys(Hv),
            blocks.rows(Hv),
            numbers,
            numbers,
            blocks.of_tokens(starts),
        ],
        out_specs=blocks.rows(H),
        out_shape=varying.struct(query.shape, query.dtype, operands),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (2 * H + Hv),
            transcendentals=pairs,
            bytes_accessed=(2 * query.size + d_out.size + key.size + value.size)
            * query.dtype.itemsize,
        ),
        name="sinkjax_flash_d_query",
        interpret=static.interpret,
    )(*operands)


def _d_query_kernel(
    static, blocks, widths, q_ref, k_ref, v_ref, do_ref, denominator_ref, delta_ref, starts_ref, dq_ref
):  # fmt: skip
    spans = blocks.spans
    bq, i = spans.tile.query, blocks.number()
    first = i * bq
    left = spans.queries - first
    query = static.queries(tiles.load_rows(q_ref, (), 0, bq, left, widths[0]))
    d_out = tiles.load_rows(do_ref, (), 0, bq, left, widths[1])
    denominator, delta = row_numbers(denominator_ref, delta_ref, (), 0, bq, left)
    if delta is not None:
        denominator, delta = denominator[:, None], delta[:, None]
    rows = fwd.BlockRows(static, spans, i, starts_ref)

    def absorb(n, total, place):
        start, size, limit, where = place(n)
        keys = tiles.load_rows(k_ref, (), start, size, limit, widths[0])
        values = tiles.load_rows(v_ref, (), start, size, limit, widths[1])
        dw = static.dot(d_out, values, (1, 1))
        _, d_scores = gradients(static, query, keys, dw, denominator, delta, where)
        return total + static.dot(d_scores, keys)

    total = rows.sweep(absorb, jnp.zeros((bq, padded(widths[0])), jnp.float32))
    tiles.store_rows(dq_ref, total * static.scale, first, spans.queries, widths[0])


def row_numbers(denominator_ref, delta_ref, at: tuple, start, rows: int, limit) -> tuple[Any, Any]:
    """Denominators in base 2 and D − dL of some queries, or None for both."""
    if delta_ref is None:
        return None, None
    denominator = tiles.load_numbers(denominator_ref, at, start, rows, limit) * LOG2_E
    return denominator, tiles.load_numbers(delta_ref, at, start, rows, limit)


def gradients(static: Static, a, b, dw, denominator, delta, where):
    """Weights of a tile with rows a and columns b, and the gradient by its scores, less the scale."""
    policy, power = static.policy, static.power
    scores, slope = static.scores(a, b)
    if where is not None:
        scores = jnp.where(where, scores, policy.hidden)
    weights = policy.weights(scores, power, denominator)
    d_scores = policy.d_logits(scores, power, denominator, weights, dw, delta)
    return weights, d_scores if slope is None else d_scores * slope


def d_key_value(static: Static, query, key, value, d_out, denominator, delta, starts, ends):
    """Gradients of keys and values, `[B, S, K, H]` and `[B, S, K, Hv]`, without the far sink pairs.

    Args:
        ends: where the segment of each key ends, `[1 or B, S]`, or None; the rest as in `d_query`.
    """
    B, T, N, H = query.shape
    S, K, Hv = value.shape[1:]
    G = N // K
    tile = static.blocks.d_keys
    spans = Spans(static.ranges, T, S, tile)

    def keys(width):
        def place(j, bk):
            return div(bk, K), j, rem(bk, K), 0

        return pl.BlockSpec((None, tile.keys, None, padded(width)), place)

    group = GroupSpecs(spans, K, G)
    operands = (query, key, value, d_out, denominator, delta, starts, ends)
    pairs = static.ranges.pairs(T) * B * N
    return pl.pallas_call(
        partial(_d_key_value_kernel, static, spans, G, (H, Hv)),
        grid=(spans.key_blocks, B * K),
        in_specs=[
            group.rows(H),
            keys(H),
            keys(Hv),
            group.rows(Hv),
            group.numbers(denominator),
            group.numbers(delta),
            group.of_tokens(starts),
            group.of_tokens(ends),
        ],
        out_specs=[keys(H), keys(Hv)],
        out_shape=[varying.struct(x.shape, x.dtype, operands) for x in (key, value)],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * 2 * (H + Hv),
            transcendentals=pairs,
            bytes_accessed=(query.size + d_out.size + 2 * key.size + 2 * value.size)
            * query.dtype.itemsize,
        ),
        name="sinkjax_flash_d_key_value",
        interpret=static.interpret,
    )(*operands)


class GroupSpecs:
    """What programs of a grid (block, batch row and key head) read of the heads of the group."""

    def __init__(self, spans: Spans, K: int, G: int):
        self.spans, self.K, self.G = spans, K, G
        self.length = up(spans.queries, spans.tile.query)

    def rows(self, width: int):
        """All queries of the group in `[B, T, N, width]`."""

        def place(_, bk):
            return div(bk, self.K), 0, rem(bk, self.K), 0

        return pl.BlockSpec((None, self.length, self.G, padded(width)), place)

    def numbers(self, x):
        """All numbers of the group in `[B, N, T]`."""
        if x is None:
            return None

        def place(_, bk):
            return div(bk, self.K), rem(bk, self.K), 0

        return pl.BlockSpec((None, self.G, self.length), place)

    def of_tokens(self, x):
        """One number for each token of the batch row, `[1 or B, T]`."""
        if x is None:
            return None
        of_row = x.shape[0] > 1

        def place(_, bk):
            return div(bk, self.K) if of_row else 0, 0

        return pl.BlockSpec((None, self.length), place)


def _d_key_value_kernel(
    static, spans, G, widths, q_ref, k_ref, v_ref, do_ref, denominator_ref, delta_ref,
    starts_ref, ends_ref, dk_ref, dv_ref,
):  # fmt: skip
    """Tiles are transposed, keys by queries: their products with dO and q need no transposition."""
    bq, bk, T, S = spans.tile.query, spans.tile.keys, spans.queries, spans.keys
    j = pl.program_id(0)
    first = j * bk
    keys = tiles.load_rows(k_ref, (), 0, bk, S - first, widths[0])
    values = tiles.load_rows(v_ref, (), 0, bk, S - first, widths[1])
    key = (first + jnp.arange(bk))[:, None]
    ends = None, None
    if ends_ref is not None:
        ends = ends_ref[first], ends_ref[jnp.minimum(first + bk, S) - 1]
    run = spans.of_key_block(j, *ends)

    def head(g, carry):
        def visit(i, is_partial, carry):
            where = None
            if is_partial:
                query = (spans.ranges.offset + i * bq + jnp.arange(bq))[None, :]
                starts = None
                if starts_ref is not None:
                    starts = tiles.load_numbers(starts_ref, (), i * bq, bq, T)[None, :]
                where = tiles.seen(spans.ranges, query, key, starts)
            rows = query_tile(static, q_ref, do_ref, g, i, spans, widths, is_partial)
            limit = T if is_partial else None
            numbers = row_numbers(denominator_ref, delta_ref, (g,), i * bq, bq, limit)
            return add_tile(static, keys, values, rows, numbers, where, carry)

        return tiles.along_run(spans, run, spans.key_edges, visit, carry)

    sums = tuple(jnp.zeros((bk, padded(width)), jnp.float32) for width in widths)
    d_keys, d_values = tiles.loop(0, G, head, sums)
    tiles.store_rows(dk_ref, d_keys * abs(static.scale), first, S, widths[0])
    tiles.store_rows(dv_ref, d_values, first, S, widths[1])


def query_tile(static, q_ref, do_ref, g, i, spans, widths, is_partial):
    """Block i of head g of the group: queries, and the cotangent of their output."""
    bq = spans.tile.query
    limit = spans.queries if is_partial else None
    query, d_out = (
        tiles.load_rows(ref, (g,), i * bq, bq, limit, width)
        for ref, width in zip((q_ref, do_ref), widths, strict=True)
    )
    return static.queries(query), d_out


def add_tile(static, keys, values, rows, numbers, where, sums):
    """The sums with one more tile, keys by queries."""
    query, d_out = rows
    denominator, delta = numbers
    if delta is not None:
        denominator, delta = denominator[None, :], delta[None, :]
    dw = static.dot(values, d_out, (1, 1))
    weights, d_scores = gradients(static, keys, query, dw, denominator, delta, where)
    d_keys, d_values = sums
    return d_keys + static.dot(d_scores, query), d_values + static.dot(weights, d_out)
