"""Forward GPU kernel: q, k, v → out and, where the policy has one, the logarithm of the denominator.

One program per query block and head: the sink tokens that its run of key blocks leaves out, then the
run, with an online normaliser.
"""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import div, rem

from sinkjax_kernels import varying
from sinkjax_kernels.flash import gpu_tiles as tiles
from sinkjax_kernels.flash.gpu_policies import LN_2, LOG2_E
from sinkjax_kernels.flash.gpu_spans import Spans, up
from sinkjax_kernels.flash.gpu_tiles import Static, padded


def forward(static: Static, query, key, value, sinks, starts):
    """Output `[B, T, N, Hv]` and denominators `[B, N, T]` (natural logarithm) or None.

    Args:
        sinks: sink logits `[1 or B, N, 1 or T]` in float32, or None.
        starts: where the segment of each query begins, `[1 or B, T]`, or None.
    """
    B, T, N, H = query.shape
    S, K, Hv = value.shape[1:]
    tile = static.blocks.forward
    spans = Spans(static.ranges, T, S, tile)
    blocks = QueryBlocks(spans, N, K)
    pairs = static.ranges.pairs(T) * B * N
    results = [varying.struct((B, T, N, Hv), query.dtype, query, key, value, sinks, starts)]
    specs = [blocks.rows(Hv)]
    if static.policy.has_denominator:
        results.append(varying.struct((B, N, T), jnp.float32, query, key, value, sinks, starts))
        specs.append(blocks.numbers())
    out, *denominator = pl.pallas_call(
        partial(_kernel, static, blocks, (H, Hv)),
        grid=(spans.query_blocks, B * N),
        in_specs=[
            blocks.rows(H),
            blocks.keys(H),
            blocks.keys(Hv),
            blocks.sinks(sinks),
            blocks.of_tokens(starts),
        ],
        out_specs=specs,
        out_shape=results,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (H + Hv),
            transcendentals=pairs,
            bytes_accessed=(query.size + B * T * N * Hv + key.size + value.size)
            * query.dtype.itemsize,
        ),
        name="sinkjax_flash_forward",
        interpret=static.interpret,
    )(query, key, value, sinks, starts)
    return out, denominator[0] if denominator else None


class QueryBlocks:
    """What programs of a grid (query block, batch row and head) read and write.

    The last block comes first: in causal attention it takes longest.
    """

    def __init__(self, spans: Spans, N: int, K: int):
        self.spans, self.N, self.G = spans, N, N // K

    def number(self):
        """The query block of a program."""
        return self._block(pl.program_id(0))

    def _block(self, i):
        return self.spans.query_blocks - 1 - i

    def rows(self, width: int):
        """The block's rows of `[B, T, N, width]`."""

        def place(i, bn):
            return div(bn, self.N), self._block(i), rem(bn, self.N), 0

        return pl.BlockSpec((None, self.spans.tile.query, None, padded(width)), place)

    def numbers(self):
        """The block's numbers of `[B, N, T]`."""

        def place(i, bn):
            return div(bn, self.N), rem(bn, self.N), self._block(i)

        return pl.BlockSpec((None, None, self.spans.tile.query), place)

    def keys(self, width: int):
        """All rows of the key head in `[B, S, K, width]`."""

        def place(_, bn):
            return div(bn, self.N), 0, div(rem(bn, self.N), self.G), 0

        length = up(self.spans.keys, self.spans.tile.keys)
        return pl.BlockSpec((None, length, None, padded(width)), place)

    def sinks(self, x):
        """Of `[1 or B, N, 1 or T]` one number, or one for each query of the block."""
        if x is None:
            return None
        of_row, of_token = x.shape[0] > 1, x.shape[2] > 1

        def place(i, bn):
            b, i = div(bn, self.N) if of_row else 0, self._block(i) if of_token else 0
            return b, rem(bn, self.N), i

        return pl.BlockSpec((None, None, self.spans.tile.query if of_token else 1), place)

    def of_tokens(self, x):
        """Of `[1 or B, T]` one number for each token of the batch row."""
        if x is None:
            return None
        of_row = x.shape[0] > 1

        def place(_, bn):
            return div(bn, self.N) if of_row else 0, 0

        return pl.BlockSpec((None, up(x.shape[1], self.spans.tile.query)), place)


def _kernel(static, blocks, widths, q_ref, k_ref, v_ref, sinks_ref, starts_ref, out_ref, *lse_ref):
    spans = blocks.spans
    policy, bq, T = static.policy, spans.tile.query, spans.queries
    i = blocks.number()
    first = i * bq
    query = static.queries(tiles.load_rows(q_ref, (), 0, bq, T - first, widths[0]))
    sinks = None
    if sinks_ref is not None:
        if sinks_ref.shape[0] > 1:
            sinks = tiles.load_numbers(sinks_ref, (), 0, bq, T - first)
        else:
            sinks = jnp.broadcast_to(sinks_ref[0], (bq,))
        sinks = sinks * LOG2_E
    rows = BlockRows(static, spans, i, starts_ref)

    def absorb(n, carry, place):
        state, acc = carry
        start, size, limit, where = place(n)
        scores, _ = static.scores(query, tiles.load_rows(k_ref, (), start, size, limit, widths[0]))
        if where is not None:
            scores = jnp.where(where, scores, policy.hidden)
        state, rescale, numerators = policy.absorb(state, scores, static.power)
        values = tiles.load_rows(v_ref, (), start, size, limit, widths[1])
        if rescale is not None:
            acc = acc * rescale[:, None]
        return state, acc + static.dot(numerators, values)

    acc = jnp.zeros((bq, padded(widths[1])), jnp.float32)
    state, acc = rows.sweep(absorb, (policy.start(sinks, bq), acc))
    finished = policy.finish(state)
    if finished is not None:
        denominator, factor = finished
        acc = acc * factor[:, None]
        inside = first + jnp.arange(bq) < T
        plt.store(lse_ref[0], denominator * LN_2, mask=inside)
    tiles.store_rows(out_ref, acc, first, T, widths[1])


class BlockRows:
    """A block of queries in a kernel: the tiles that it visits, and who is visible in each."""

    def __init__(self, static: Static, spans: Spans, i, starts_ref):
        self.static, self.spans = static, spans
        bq = spans.tile.query
        first, self.start, last_start, self.starts = i * bq, 0, 0, None
        self.query = (spans.ranges.offset + first + jnp.arange(bq))[:, None]
        if starts_ref is not None:
            self.start = starts_ref[first]
            last_start = starts_ref[jnp.minimum(first + bq, spans.queries) - 1]
            self.starts = tiles.load_numbers(starts_ref, (), first, bq, spans.queries)[:, None]
        self.run = spans.of_query_block(i, self.start, last_start)

    def sweep(self, visit, carry):
        """`visit(n, carry, place)` of every tile; `place(n)` is its first key, size, end and mask."""
        ranges, static, spans = self.spans.ranges, self.static, self.spans

        def sink_tile(n):
            size = static.sink_tile
            start = self.start + n * size
            key = (start + jnp.arange(size))[None, :]
            where = key < end
            if self.starts is not None:
                where &= key >= self.starts
            return start, size, end, where

        def run_tile(n, is_partial):
            size = spans.tile.keys
            start = n * size
            if not is_partial:
                return start, size, None, None
            key = (start + jnp.arange(size))[None, :]
            return start, size, spans.keys, tiles.seen(ranges, self.query, key, self.starts)

        if ranges.num_sink_tokens:
            count, end = spans.sink_tiles(self.run[0], self.start, static.sink_tile)
            carry = tiles.loop(0, count, lambda n, c: visit(n, c, sink_tile), carry)

        def visit_run(n, is_partial, carry):
            return visit(n, carry, lambda n: run_tile(n, is_partial))

        return tiles.along_run(spans, self.run, spans.query_edges, visit_run, carry)
