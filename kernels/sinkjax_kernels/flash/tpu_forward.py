"""Forward pass of attention over ranges on TPU: q, k, v → out, logarithm of the denominator.

Narrow windows: one grid step per query block with its whole span of keys (`tpu_forward_span`). Causal
attention and wide windows: a loop over the keys of a head (`tpu_forward_loop`), which stay in VMEM if they
fit.

Arrays are `[B, N, T, H]`, the logarithm is `[B, N, 1, T]`: one number per query and head.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels import varying
from sinkjax_kernels.flash import segments
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_forward_loop import loop_kernel
from sinkjax_kernels.flash.tpu_forward_span import span_kernel
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static

SHARED = 512  # largest window whose keys are shared by the heads of a group, step by step


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the query blocks of a call lie.

    Args:
        narrow: whether a block's span of keys is unrolled as a whole.
        block: queries of a block.
        blocks: number of blocks.
        heads: heads of a group that share a step.
        front: empty query slots before query 0, so that blocks begin at a multiple of 128.
        origin: index of the key at the first query slot.
        base: first key that is handed over.
        resident: whether the keys of a head stay in VMEM where it is not `narrow`.
    """

    narrow: bool
    block: int
    blocks: int
    heads: int
    front: int
    origin: int
    base: int
    resident: bool = True

    @property
    def keys(self) -> int:
        """Keys that are handed over."""
        return self.origin - self.base + self.block * self.blocks

    @classmethod
    def of(cls, static: Static, length: int, group: int) -> "Plan":
        ranges, most = static.ranges, static.blocks.query
        front = ranges.offset % GRAIN
        origin, slots = ranges.offset - front, front + length
        heads = 1
        if ranges.window is not None and ranges.window <= SHARED:
            # Small tiles: twice the queries in a step, of all heads of a group if the window allows.
            least = tiles.reach(ranges.window)
            most *= 2 if least <= SHARED // 2 else 1
            fits = (n for n in range(1, group + 1) if group % n == 0 and most // n >= least)
            heads = max(fits, default=1)
            most = most // heads // GRAIN * GRAIN
        narrow, block = tiles.layout(ranges, slots, most)
        base = 0
        if ranges.window is not None:
            grain = GRAIN if narrow else tiles.chunk_size(static, block)
            base = max(0, origin - max(GRAIN, tiles.up(ranges.window - 1, grain)))
        return cls(narrow, block, -(-slots // block), heads if narrow else 1, front, origin, base)


def forward(static: Static, query, key, value, sinks, starts):
    """Output `[B, N, T, Hv]`, and the logarithm of the denominator `[B, N, 1, T]` or None.

    Args:
        query, key, value: `[B, N or K, T or S, H]`, S at least T and the offset.
        sinks: sink logits `[N]` in float32, not read where `static.has_sinks` is False.
        starts: `segments.starts_of` packed rows, or None.
    """
    B, N, T, H = query.shape
    K, Hv = key.shape[1], value.shape[-1]
    ranges, item = static.ranges, query.dtype.itemsize
    plan = Plan.of(static, T, N // K)
    need = 2 * item * plan.keys * (tiles.up(H) + tiles.up(Hv))  # two buffers each
    if need > 0.8 * tiles.VMEM_BYTES:  # the rest is for the query block and its scores
        plan = dataclasses.replace(plan, resident=False)
    block, length, f = plan.block, plan.block * plan.blocks, plan.heads
    groups = N // K // f
    query = jnp.pad(query, ((0, 0), (0, 0), (plan.front, length - plan.front - T), (0, 0)))
    keys_of = partial(_keys_of, plan)
    operands = {"sinks": sinks, "query": query, "key": keys_of(key), "value": keys_of(value)}

    def queries(width):
        return pl.BlockSpec((None, f, block, width), lambda b, k, i, g: (b, k * groups + g, i, 0))

    def keys(width):
        if plan.narrow:
            return around(tiles.reach(ranges.window or 0), width)
        if not plan.resident:
            return pl.BlockSpec(memory_space=pl.ANY)
        return pl.BlockSpec((None, None, plan.keys, width), lambda b, k, i, g: (b, k, 0, 0))

    def around(before, width):
        """A block's keys and those before it: overlapping blocks, so that the index counts keys."""
        lead = plan.origin - plan.base - before
        return pl.BlockSpec(
            (None, None, pl.Element(min(before + block, plan.keys)), pl.Element(width)),
            lambda b, k, i, g: (b, k, tiles.span_start(i * block + lead), 0),
        )

    whole = pl.BlockSpec(memory_space=pltpu.SMEM)
    specs = {"sinks": whole, "query": queries(H), "key": keys(H), "value": keys(Hv)}
    scratch = {}
    if not plan.narrow and not plan.resident:
        chunk = tiles.chunk_size(static, block)
        scratch["arrived"] = pltpu.SemaphoreType.DMA((2, 2))
        for name, width in (("key", H), ("value", Hv)):
            operands[f"near_{name}"] = operands[name]
            specs[f"near_{name}"] = around((plan.origin - plan.base) % chunk, width)
            scratch[f"chunk_{name}"] = pltpu.VMEM((2, chunk, width), query.dtype)
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, 0), (0, length - T)), mode="edge")
        operands["low"] = segments.first_keys(starts, ranges.window)
        specs["low"] = pl.BlockSpec((None, 1, block), lambda b, k, i, g: (b, 0, i))
        scratch["lows"] = pltpu.VMEM((block, GRAIN), jnp.int32)
        if not plan.narrow:
            operands["bounds"] = segments.block_bounds(starts, block, ranges.window)
            specs["bounds"] = whole
    if ranges.num_sink_tokens:
        tile = (GRAIN, lambda b, k, i, g: (b, k, 0, 0))
        operands |= {"sink_key": operands["key"], "sink_value": operands["value"]}
        if plan.base:
            operands |= {"sink_key": key[:, :, :GRAIN], "sink_value": value[:, :, :GRAIN]}
        if starts is not None:
            sinks_of = segments.sink_tiles(starts, block, ranges)
            tile = (segments.sink_rows(ranges, block), lambda b, k, i, g: (b, k, i, 0))
            operands["sink_key"] = segments.gather(operands["key"], sinks_of.index)
            operands["sink_value"] = segments.gather(operands["value"], sinks_of.index)
            operands["seen_by"] = tiles.pad_axis(jnp.stack([*sinks_of[1:]], axis=2), GRAIN, 3)
            specs["seen_by"] = pl.BlockSpec((None, None, 2, GRAIN), lambda b, k, i, g: (b, i, 0, 0))
        for name, width in (("sink_key", H), ("sink_value", Hv)):
            specs[name] = pl.BlockSpec((None, None, tile[0], width), tile[1])
    if not plan.narrow:
        scratch["scaled"] = pltpu.VMEM((block, H), query.dtype)
        scratch["accs"] = pltpu.VMEM((block, Hv), jnp.float32)
        if static.policy.has_top:
            scratch["tops"] = pltpu.VMEM((block, GRAIN), jnp.float32)
            scratch["totals"] = pltpu.VMEM((block, GRAIN), jnp.float32)
    given = tuple(operands.values())
    results = {"out": (queries(Hv), varying.struct((B, N, length, Hv), query.dtype, *given))}
    if static.policy.has_top:
        spec = pl.BlockSpec((None, f, 1, block), lambda b, k, i, g: (b, k * groups + g, 0, i))
        results["lse"] = spec, varying.struct((B, N, 1, length), jnp.float32, *given)
    kernel = span_kernel if plan.narrow else loop_kernel
    pairs = ranges.pairs(T) * B * N
    found = pl.pallas_call(
        partial(kernel, static, plan, (*operands, *results, *scratch)),
        grid=(B, K, plan.blocks, groups),
        in_specs=[specs[name] for name in operands],
        out_specs=[spec for spec, _ in results.values()],
        out_shape=[shape for _, shape in results.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (H + Hv),
            transcendentals=pairs,
            bytes_accessed=(query.size + B * N * length * Hv) * item
            + sum(operands[name].size for name in ("key", "value")) * item,
        ),
        name="sinkjax_flash_forward",
        interpret=static.interpret,
    )(*given)
    mine = slice(plan.front, plan.front + T)
    return found[0][:, :, mine], found[1][..., mine] if static.policy.has_top else None


def _keys_of(plan: Plan, x: jax.Array) -> jax.Array:
    """Keys or values from the first one that is needed, with as many slots as the blocks reach."""
    return tiles.pad_axis(x[:, :, plan.base :] if plan.base else x, plan.keys, 2)
