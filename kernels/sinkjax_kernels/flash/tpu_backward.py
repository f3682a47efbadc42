"""Backward kernels of softmax attention over ranges, for TPU: dq, dk and dv in one pass.

Scores are transposed, keys × queries, so that the log-sum-exp and D − dL are compact rows. Query blocks
come in descending order: a key block's last contribution is then that of its own queries, which writes
it out, and key block 0, which holds the sink tokens, comes last. dq is complete in each step.

Narrow windows keep dk and dv of the key blocks in flight in a ring in VMEM; causal attention and wide
windows those of the whole head. Total work is that of the visible tiles, O(T · (P + W)).

The formulas are those of `flash.families`: P = exp(X − LSE), dV = Pᵀ dO, dX = P ∘ (dP − (D − dL)).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_forward import chunks_of
from sinkjax_kernels.flash.tpu_policies import LOG2_E
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static, dot


def backward(static: Static, query, key, value, d_out, lse, delta):
    """dq, dk and dv from the cotangent of the output.

    Args:
        query, key, value, d_out: `[B, N or K, T, H]`.
        lse: the log-sum-exp `[B, N, 1, T]`.
        delta: D − dL `[B, N, 1, T]`, D = sum(dO · O) and dL the cotangent of the log-sum-exp.
    """
    B, N, T, H = query.shape
    K, Hv = key.shape[1], value.shape[-1]
    G = N // K
    ranges = static.ranges
    narrow, block = tiles.layout(ranges, T, static.blocks.query_backward)
    blocks = -(-T // block)
    length = blocks * block
    query, key, value, d_out = (tiles.pad_axis(x, length, 2) for x in (query, key, value, d_out))
    lse, delta = (tiles.pad_axis(x, length, 3) for x in (lse * LOG2_E, delta))
    sink_rows = tiles.up(ranges.num_sink_tokens, 16)

    def descending(i):
        return blocks - 1 - i

    def queries(width):
        return pl.BlockSpec(
            (None, None, block, width), lambda b, k, i, g: (b, k * G + g, descending(i), 0)
        )

    def finished(width):
        return pl.BlockSpec((None, None, block, width), lambda b, k, i, g: (b, k, descending(i), 0))

    row = pl.BlockSpec((None, None, 1, block), lambda b, k, i, g: (b, k * G + g, 0, descending(i)))
    operands = [query, d_out, lse, delta, key, value]
    if narrow:
        assert ranges.window is not None
        reach = tiles.reach(ranges.window)
        span = min(reach + block, length)
        slots = -(-reach // block) + 1
        kernel = partial(_span_kernel, static, G, block, blocks)

        def keys(width):
            return pl.BlockSpec(
                (None, None, pl.Element(span), pl.Element(width)),
                lambda b, k, i, g: (b, k, tiles.span_start(descending(i) * block - reach), 0),
            )

        key_specs = [keys(H), keys(Hv)]
        if sink_rows:
            operands += [key, value]
            key_specs += [
                pl.BlockSpec((None, None, sink_rows, w), lambda b, k, i, g: (b, k, 0, 0))
                for w in (H, Hv)
            ]
        kept = [pltpu.VMEM((slots, block, w), jnp.float32) for w in (H, Hv)]
        if sink_rows:
            kept += [pltpu.VMEM((sink_rows, w), jnp.float32) for w in (H, Hv)]
    else:
        kernel = partial(_loop_kernel, static, G, block)
        key_specs = [
            pl.BlockSpec((None, None, length, w), lambda b, k, i, g: (b, k, 0, 0)) for w in (H, Hv)
        ]
        kept = [pltpu.VMEM((length, w), jnp.float32) for w in (H, Hv)]
    pairs = ranges.pairs(T) * B * N
    moved = 2 * query.size + d_out.size + 2 * key.size + 2 * value.size
    dq, dk, dv = pl.pallas_call(
        kernel,
        grid=(B, K, blocks, G),
        in_specs=[queries(H), queries(Hv), row, row, *key_specs],
        out_specs=[queries(H), finished(H), finished(Hv)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        scratch_shapes=[
            pltpu.VMEM((block, H), query.dtype),
            pltpu.VMEM((Hv, block), query.dtype),
            pltpu.VMEM((H, block), jnp.float32),
            *kept,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (3 * H + 2 * Hv),
            transcendentals=pairs,
            bytes_accessed=moved * query.dtype.itemsize + 8 * lse.size,
        ),
        name="sinkjax_flash_backward",
        interpret=static.interpret,
    )(*operands)
    return dq[:, :, :T], dk[:, :, :T], dv[:, :, :T]


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Some keys, as the units that share them see them.

    Args:
        load: key and value tiles `[keys, H]`, `[keys, Hv]`.
        hide: sets weights of invisible pairs to 0, given them and the first query of the unit.
        commit: takes the sums of dk and dv over the queries of the block.
        last: first query of the last unit with these keys.
        memory: what was loaded and summed so far.
    """

    load: Callable[[], tuple[Any, Any]]
    hide: Callable[[Any, int], Any]
    commit: Callable[[Any, Any], None]
    last: int
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a step knows of its queries."""

    static: Static
    scaled: Any  # q folded, [block, H]
    d_out: Any
    d_out_t: Any  # only with wide matmuls
    lse: Any  # base 2, [1, block]
    delta: Any
    dq: Any  # transposed, [H, block]

    def scores(self, unit):
        keys, first, end = unit
        if "key" not in keys.memory:
            key, value = keys.load()
            keys.memory.update(key=key, value=value, key_t=key.T, dk=0.0, dv=0.0)
        memory = keys.memory
        score = dot(memory["key"], self.scaled[first:end, :], (1, 1))
        return score, dot(memory["value"], self.d_out[first:end, :], (1, 1))

    def spread(self, unit, products):
        keys, first, end = unit
        (score, d_weight), memory = products, keys.memory
        score, slope = self.static.capped(score)
        weight = keys.hide(jnp.exp2(score - self.lse[:, first:end]), first)
        d_score = weight * (d_weight - self.delta[:, first:end])
        if slope is not None:
            d_score = d_score * slope
        weight, d_score = (x.astype(self.scaled.dtype) for x in (weight, d_score))
        if self.is_wide(unit):
            memory["dv"] += dot(self.d_out_t[:, first:end], weight, (1, 1))
        else:
            memory["dv"] += dot(weight, self.d_out[first:end, :], (1, 0))
        memory["dk"] += dot(d_score, self.scaled[first:end, :], (1, 0))
        self.dq[:, first:end] += dot(memory["key_t"], d_score, (1, 0))
        if first == keys.last:
            dv = memory["dv"].T if self.is_wide(unit) else memory["dv"]
            keys.commit(memory["dk"], dv)

    def is_wide(self, unit):
        return self.static.blocks.wide_matmuls and unit[0].memory["key"].shape[0] >= GRAIN

    def begin(self, q_ref):
        if self.static.blocks.wide_matmuls:
            self.d_out_t[...] = self.d_out[...].T
        self.scaled[...] = self.static.folded(q_ref[...])
        self.dq[...] = jnp.zeros_like(self.dq)

    def sweep(self, units):
        tiles.staged(units, self.scores, self.spread)

    def write(self, dq_ref):
        for x in range(0, dq_ref.shape[0], GRAIN):
            part = self.dq[:, x : x + GRAIN].T * self.static.scale
            dq_ref[x : x + GRAIN, :] = part.astype(dq_ref.dtype)


def _units(load, hide, commit, low: int, high: int, rows: int):
    """The units of some keys: pieces of the queries [low, high)."""
    if low >= high:
        return []
    starts = range(low, high, rows)
    keys = _Keys(load, hide, commit, starts[-1])
    return [(keys, x, min(x + rows, high)) for x in starts]


def _hide_static(first_key: int, window: int | None):
    """Masks the partial tiles of a unit, tile by tile; `first_key` relative to the query block."""

    def hide(weight, first):
        lines = []
        for y in range(0, weight.shape[0], GRAIN):
            line = []
            for x in range(0, weight.shape[1], GRAIN):
                tile = weight[y : y + GRAIN, x : x + GRAIN]
                distance = first + x - (first_key + y)
                kind = tiles.tile_kind(distance, window)
                if kind == "empty":
                    tile = jnp.zeros_like(tile)
                elif kind == "partial":
                    tile = jnp.where(tiles.seen(tile.shape, distance, window, 1), tile, 0)
                line.append(tile)
            lines.append(tiles.join(line, 1))
        return tiles.join(lines, 0)

    return hide


def _hide_sinks(first_query, ranges):
    def hide(weight, first):
        return jnp.where(tiles.sinks_seen(weight.shape, first_query + first, ranges, 1), weight, 0)

    return hide


def _tile(refs, at):
    return lambda: tuple(ref[at, :] for ref in refs)


def _span_kernel(static, G, block, blocks, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, *rest):
    """A query block with its whole window; a ring holds dk and dv of the key blocks in flight."""
    ranges, sinks = static.ranges, bool(static.ranges.num_sink_tokens)
    sink_refs, rest = (rest[:2], rest[2:]) if sinks else ((), rest)
    dq_ref, dk_ref, dv_ref, scaled, do_t, dq, ring_k, ring_v, *sink_sums = rest
    window, reach = ranges.window, tiles.reach(ranges.window)
    wide = math.gcd(static.blocks.keys_backward, block)
    width = wide if reach % wide == 0 else GRAIN
    step, g = pl.program_id(2), pl.program_id(3)
    i = blocks - 1 - step
    slots = ring_k.shape[0]
    rows = _Rows(static, scaled, do_ref, do_t, lse_ref, delta_ref, dq)
    is_first = (step == 0) & (g == 0)

    def seen_by(start):
        """Queries of the block, cut to 128, that see keys from `start` on."""
        return max(0, start // GRAIN * GRAIN), min(block, tiles.up(start + width - 1 + window))

    def visited(start):
        low, high = seen_by(start)
        return start >= -reach and low < high

    if sinks:

        @pl.when(is_first)
        def _():
            for ref in sink_sums:
                ref[...] = jnp.zeros_like(ref)

    def body(before: int, first):
        rows.begin(q_ref)

        def commit_sinks(dk, dv):
            for ref, part in zip(sink_sums, (dk, dv), strict=True):
                ref[...] += part

        def commit(start):
            back, at = -(start // block), slice(start % block, start % block + width)
            slot = jax.lax.rem(i - back + slots, slots)
            never = not visited(start - block)  # later query blocks do not see these keys

            def one(part, ring, out_ref, sums, factor):
                if not (never and G == 1):
                    fresh = (g == 0) if never else is_first
                    part = jnp.where(fresh, part, part + ring[slot, at, :])
                if back or G > 1:
                    ring[slot, at, :] = part
                if back == 0:
                    if sums is not None and isinstance(first, int) and first + start == 0:
                        size = sums.shape[0]
                        rest = [part[size:]] if size < width else []
                        part = tiles.join([part[:size] + sums[...], *rest], 0)
                    out_ref[at, :] = (part * factor).astype(out_ref.dtype)

            def both(dk, dv):
                sums = sink_sums or (None, None)
                one(dk, ring_k, dk_ref, sums[0], static.scale / static.fold)
                one(dv, ring_v, dv_ref, sums[1], 1.0)

            return both

        units = []
        size = static.blocks.rows_backward
        if sinks:
            hide = _hide_sinks(first, ranges)
            low = max(0, (window - first) // GRAIN * GRAIN) if isinstance(first, int) else 0
            at = slice(None)
            units += _units(_tile(sink_refs, at), hide, commit_sinks, low, block, size)
        for start in range(-before, block, width):
            low, high = seen_by(start)
            at = slice(before + start, before + start + width)
            hide = _hide_static(start, window)
            units += _units(_tile((k_ref, v_ref), at), hide, commit(start), low, high, size)
        rows.sweep(units)
        rows.write(dq_ref)

    short = min(-(-reach // block), blocks)
    for n in range(short):
        pl.when(i == n)(partial(body, n * block, n * block))
    if blocks > short:
        pl.when(i >= short)(partial(body, reach, i * block))


def _loop_kernel(
    static, G, block, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref,
    dq_ref, dk_ref, dv_ref, scaled, do_t, dq, sum_k, sum_v,
):  # fmt: skip
    """Chunks of keys before the block, the sink tile, then the diagonal, which writes its keys out."""
    ranges, size = static.ranges, static.blocks.rows_backward
    width = math.gcd(static.blocks.keys_backward, block)
    chunk = tiles.chunk_size(static, block)
    step, g = pl.program_id(2), pl.program_id(3)
    first = (pl.num_programs(2) - 1 - step) * block
    rows = _Rows(static, scaled, do_ref, do_t, lse_ref, delta_ref, dq)
    rows.begin(q_ref)

    @pl.when((step == 0) & (g == 0))
    def _():
        def clear(n, _):
            for ref in (sum_k, sum_v):
                ref[pl.ds(pl.multiple_of(n * block, GRAIN), block), :] = jnp.zeros(
                    (block, ref.shape[1]), jnp.float32
                )

        jax.lax.fori_loop(0, sum_k.shape[0] // block, clear, None)

    def adds(at):
        def commit(dk, dv):
            sum_k[at, :] += dk
            sum_v[at, :] += dv

        return commit

    def near(key):
        def hide(weight, row):
            distance = tiles.distances(weight.shape, first + row - key, 1)
            return jnp.where(distance < ranges.window, weight, 0)

        return hide

    def absorb(j, edge: bool):
        units = []
        for x in range(0, chunk, width):
            key = pl.multiple_of(j * chunk + x, GRAIN)
            at = pl.ds(key, width)
            hide = near(key) if edge else (lambda weight, row: weight)
            units += _units(_tile((k_ref, v_ref), at), hide, adds(at), 0, block, size)
        rows.sweep(units)

    low, full, end = chunks_of(first, block, chunk, ranges.window)
    if ranges.window is not None:
        jax.lax.fori_loop(low, full, lambda j, _: absorb(j, True), None)
    jax.lax.fori_loop(full, end, lambda j, _: absorb(j, False), None)
    if ranges.num_sink_tokens:

        @pl.when(first + block > ranges.window)
        def _():
            at = pl.ds(0, tiles.up(ranges.num_sink_tokens, 16))
            hide = _hide_sinks(first, ranges)
            rows.sweep(_units(_tile((k_ref, v_ref), at), hide, adds(at), 0, block, size))

    def writes(start):
        at, here = pl.ds(pl.multiple_of(first + start, GRAIN), width), slice(start, start + width)

        def commit(dk, dv):
            adds(at)(dk, dv)
            factor = static.scale / static.fold
            dk_ref[here, :] = (sum_k[at, :] * factor).astype(dk_ref.dtype)
            dv_ref[here, :] = sum_v[at, :].astype(dv_ref.dtype)

        return at, commit

    units = []
    for start in range(0, block, width):
        at, commit = writes(start)
        hide = _hide_static(start, None)
        units += _units(_tile((k_ref, v_ref), at), hide, commit, start, block, size)
    rows.sweep(units)
    rows.write(dq_ref)
