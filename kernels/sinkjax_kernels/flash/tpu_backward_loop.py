"""The backward kernel of causal attention and wide windows: keys and the sums of dk and dv stay in VMEM.

Chunks of keys before the block, the sink tile, then the diagonal, which writes its keys out: it is the
last to see them.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash import tpu_units as units
from sinkjax_kernels.flash.tpu_tiles import GRAIN


def loop_kernel(plan, refs) -> None:
    static, block = plan.static, plan.block
    ranges, size = static.ranges, static.blocks.rows_backward
    width = math.gcd(static.blocks.keys_backward, block)
    chunk = tiles.chunk_size(static, block)
    step, turn = pl.program_id(2), pl.program_id(3)
    i = plan.blocks - 1 - step
    first = i * block
    packed = ranges.has_segments
    rows = refs.rows(plan)
    rows.begin(refs.query)
    sums = refs.sum_key, refs.sum_value

    @pl.when((step == 0) & (turn == 0))
    def _():
        def clear(n, _):
            for ref in sums:
                ref[pl.ds(pl.multiple_of(n * block, GRAIN), block), :] = jnp.zeros(
                    (block, ref.shape[1]), jnp.float32
                )

        jax.lax.fori_loop(0, plan.key_blocks, clear, None)

    def adds(at):
        def commit(dk, dv):
            for ref, part in zip(sums, (dk, dv), strict=True):
                ref[at, :] += part

        return commit

    def swept(number, at, hide, commit, low=0):
        load = units.from_refs((refs.key, refs.value), at)
        return units.units(units.Keys(number, load, hide, commit), low, block, plan.heads, size)

    def near(key):
        def hide(x, row, hidden):
            if packed:
                low = refs.first_keys[:, row : row + x.shape[1]] - key
                return jnp.where(units.keys_from(x.shape, low), x, hidden)
            distance = tiles.distances(x.shape, first + row - key, 1)
            return jnp.where(distance < ranges.window, x, hidden)

        return hide

    def absorb(j, edge: bool):
        work, most = [], math.gcd(width, chunk)
        for x in range(0, chunk, most):
            key = pl.multiple_of(j * chunk + x, GRAIN)
            at = pl.ds(key, most)
            hide = near(key) if edge else (lambda x, *_: x)
            work += swept(most, at, hide, adds(at))
        rows.sweep(work)

    if packed:
        low, full = (refs.bounds[pl.program_id(0), n, i] for n in range(2))
        low, full, end = tiles.chunks_from(first, chunk, low, full)
    else:
        low, full, end = tiles.chunks_of(first, block, chunk, ranges.window)
    if plan.key_blocks < plan.blocks:  # later queries have only these keys here
        most = plan.key_blocks * block // chunk
        low, full, end = (jnp.minimum(x, most) for x in (low, full, end))
    if packed or ranges.window is not None:
        jax.lax.fori_loop(low, full, lambda j, _: absorb(j, True), None)
    jax.lax.fori_loop(full, end, lambda j, _: absorb(j, False), None)
    if ranges.num_sink_tokens:
        _absorb_sinks(plan, refs, rows, first, turn, adds)

    def first_keys(low, high):
        return refs.first_keys[:, low:high] - first

    def writes(start):
        at, here = pl.ds(pl.multiple_of(first + start, GRAIN), width), slice(start, start + width)

        def commit(dk, dv):
            adds(at)(dk, dv)
            factor = static.scale / static.fold
            refs.dk[here, :] = (refs.sum_key[at, :] * factor).astype(refs.dk.dtype)
            refs.dv[here, :] = refs.sum_value[at, :].astype(refs.dv.dtype)

        return at, commit

    def diagonal():
        work = []
        for start in range(0, block, width):
            at, commit = writes(start)
            hide = units.hide_static(start, None, first_keys if packed else None)
            work += swept(width, at, hide, commit, start)
        rows.sweep(work)

    if plan.key_blocks < plan.blocks:
        pl.when(i < plan.key_blocks)(diagonal)
    else:
        diagonal()
    rows.write(refs.dq)


def _absorb_sinks(plan, refs, rows, first, turn, adds) -> None:
    """The sink tokens outside the window: tokens 0 … P − 1, or the tile gathered for this block."""
    static = plan.static
    ranges, packed = static.ranges, static.ranges.has_segments
    number = refs.sink_key.shape[0] if packed else tiles.up(ranges.num_sink_tokens, 16)
    if packed:

        @pl.when(turn == 0)
        def _():
            for ref in refs.sink_sums:
                ref[...] = jnp.zeros_like(ref)

    def commit(dk, dv):
        for ref, part in zip(refs.sink_sums, (dk, dv), strict=True):
            ref[...] += part

    @pl.when(first + plan.block > ranges.window)
    def _():
        at = pl.ds(0, number)
        if packed:
            load = units.from_refs((refs.sink_key, refs.sink_value), at)
            hide = units.hide_gathered(first, refs.seen_by[...])
            keys = units.Keys(number, load, hide, commit)
        else:
            load = units.from_refs((refs.key, refs.value), at)
            keys = units.Keys(number, load, units.hide_sinks(first, ranges), adds(at))
        rows.sweep(units.units(keys, 0, plan.block, plan.heads, static.blocks.rows_backward))
