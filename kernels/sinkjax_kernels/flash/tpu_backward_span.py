"""The backward kernel of narrow windows: a query block with its whole span of keys, every tile static.

A ring holds dk and dv of the key blocks in flight, in float32; a key block leaves it with its own queries,
the last that see it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash import tpu_units as units
from sinkjax_kernels.flash.tpu_tiles import GRAIN


def span_kernel(plan, refs) -> None:
    static, block, blocks = plan.static, plan.block, plan.blocks
    ranges, size = static.ranges, static.blocks.rows_backward
    window, reach = ranges.window, plan.reach
    wide = math.gcd(static.blocks.keys_backward, block)
    width = wide if reach % wide == 0 else GRAIN
    step, turn = pl.program_id(2), pl.program_id(3)
    i = blocks - 1 - step
    slots = refs.sum_key.shape[0]
    rows = refs.rows(plan)
    is_first = (step == 0) & (turn == 0)
    packed = ranges.has_segments

    def seen_by(start):
        """Queries of the block, cut to 128, that see keys from `start` on."""
        return max(0, start // GRAIN * GRAIN), min(block, tiles.up(start + width - 1 + window))

    def visited(start):
        low, high = seen_by(start)
        return start >= -reach and low < high

    if ranges.num_sink_tokens and not packed:

        @pl.when(is_first)
        def _():
            for ref in refs.sink_sums:
                ref[...] = jnp.zeros_like(ref)

    def commit_sinks(dk, dv):
        for ref, part in zip(refs.sink_sums, (dk, dv), strict=True):
            if packed:  # a sum of this block
                ref[...] = jnp.where(turn == 0, part, part + ref[...])
            else:
                ref[...] += part

    def chunks(before, first, starts):
        """The keys from `starts` on with their queries; `before` keys of the span lie before the block."""
        has_key_0 = is_zero(first) or not is_static(before)  # for sure, or perhaps

        def commit(start):
            back, at = -(start // block), slice(start % block, start % block + width)
            slot = jax.lax.rem(i - back + slots, slots)
            never = not visited(start - block)  # later query blocks do not see these keys

            def one(part, ring, out_ref, sums, factor):
                if not (never and plan.turns == 1):
                    fresh = (turn == 0) if never else is_first
                    part = jnp.where(fresh, part, part + ring[slot, at, :])
                if back or plan.turns > 1:
                    ring[slot, at, :] = part
                if back == 0:
                    if sums is not None and start == 0 and has_key_0:
                        most = sums.shape[0]
                        rest = [part[most:]] if most < width else []
                        more = sums[...] if is_static(first) else jnp.where(i == 0, sums[...], 0)
                        part = tiles.join([part[:most] + more, *rest], 0)
                    out_ref[at, :] = (part * factor).astype(out_ref.dtype)

            def both(dk, dv):
                sums = (None, None) if packed or not refs.sink_sums else refs.sink_sums
                one(dk, refs.sum_key, refs.dk, sums[0], static.scale / static.fold)
                one(dv, refs.sum_value, refs.dv, sums[1], 1.0)

            return both

        def first_keys(low, high):
            return refs.first_keys[:, low:high] - first

        def chunk(start):
            at = slice(before + start, before + start + width)
            if not is_static(before):
                at = pl.ds(pl.multiple_of(before + start, GRAIN), width)
            hide = units.hide_static(start, window, first_keys if packed else None)
            load = units.from_refs((refs.key, refs.value), at)
            return units.Keys(width, load, hide, commit(start))

        return [(chunk(start), *seen_by(start)) for start in starts]

    def sink_keys(first):
        if packed:
            hide = units.hide_gathered(first, refs.seen_by[...])
        else:
            hide = units.hide_sinks(first, ranges)
        load = units.from_refs((refs.sink_key, refs.sink_value), slice(None))
        return units.Keys(refs.sink_key.shape[0], load, hide, commit_sinks)

    def no_sinks():
        if packed:
            for ref in refs.sink_sums:
                ref[...] = jnp.zeros_like(ref)

    def sweep(work):
        cut = [units.units(keys, low, high, plan.heads, size) for keys, low, high in work]
        rows.sweep([unit for some in cut for unit in some])

    def body(before: int, first):
        """All of a block in one sweep; `first` is its first query."""
        rows.begin(refs.query)
        work = chunks(before, first, range(-before, block, width))
        if ranges.num_sink_tokens:
            low = max(0, (window - first) // GRAIN * GRAIN) if is_static(first) else 0
            if low < block:
                # Block 0 takes the sums of the sink tokens with its first keys.
                _place(sink_keys(first), low, block, work, 1 if is_zero(first) else None)
            else:
                no_sinks()
        sweep(work)
        rows.write(refs.dq)

    def parts(back: int):
        """A block by parts, of which the first blocks leave out those before key 0; `back` blocks at most."""
        first = i * block
        before = jnp.minimum(first, reach)
        rows.begin(refs.query)
        if ranges.num_sink_tokens and (back + 1) * block > window:
            sees = first + block > window
            pl.when(sees)(lambda: sweep([(sink_keys(first), 0, block)]))
            pl.when(jnp.logical_not(sees))(no_sinks)
        elif ranges.num_sink_tokens:
            no_sinks()
        for n in range(back, 0, -1):
            starts = range(max(-n * block, -reach), -(n - 1) * block, width)
            pl.when(i >= n)(lambda starts=starts: sweep(chunks(before, first, starts)))
        sweep(chunks(before, first, range(0, block, width)))
        rows.write(refs.dq)

    short = min(-(-reach // block), blocks)  # blocks whose span begins at key 0
    if plan.has_parts:
        parts(short)
        return
    # Two bodies at most: each block of its own would make the program long.
    pl.when(i < short)(partial(body, 0, 0) if short == 1 else partial(parts, short - 1))
    if blocks > short:
        pl.when(i >= short)(partial(body, reach, i * block))


def is_static(x) -> bool:
    return isinstance(x, int)


def is_zero(x) -> bool:
    return is_static(x) and x == 0


def _place(sinks, low, high, work, most: int | None) -> None:
    """Sink tokens join keys of `work[:most]` that the same queries see, or come first."""
    for n, (keys, *queries) in enumerate(work[:most]):
        if queries == [low, high]:
            work[n] = (units.stacked(sinks, keys), low, high)
            return
    work.insert(0, (sinks, low, high))
