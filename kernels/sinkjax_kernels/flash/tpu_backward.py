"""Backward pass of attention over ranges, for TPU: dq, dk and dv in one kernel.

Query blocks come in descending order: a key block's last contribution is then that of its own queries,
which writes it out, and key block 0, which holds the sink tokens, comes last. dq is complete in each step.

Narrow windows keep dk and dv of the key blocks in flight in a ring in VMEM (`tpu_backward_span`); causal
attention and wide windows those of the whole head (`tpu_backward_loop`). Total work is that of the visible
tiles, O(T · (P + W)).
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels import varying
from sinkjax_kernels.flash import segments
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_backward_loop import loop_kernel
from sinkjax_kernels.flash.tpu_backward_span import span_kernel
from sinkjax_kernels.flash.tpu_policies import LOG2_E, ExpSum
from sinkjax_kernels.flash.tpu_tiles import Static
from sinkjax_kernels.flash.tpu_units import Rows

MOST_TILES = 64  # 128 × 128, of a program whose tiles are longer than those of plain softmax


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut: grid (B, K, blocks, turns).

    Args:
        heads: query heads of a group that a step takes at once; a group needs `turns` of them.
        block: queries of a step and head.
        narrow: whether the keys of a step are one span, not all of the call.
        key_blocks: of the keys of the call: those of its first queries.
    """

    static: Static
    heads: int
    turns: int
    block: int
    blocks: int
    narrow: bool
    key_blocks: int

    @property
    def reach(self) -> int:
        """Keys of a span before its block."""
        assert self.static.ranges.window is not None
        return tiles.reach(self.static.ranges.window)

    @property
    def has_parts(self) -> bool:
        """Whether the first blocks of a span kernel run parts of its one body, not bodies of their own.

        It costs 6 % of the bundles of W = 1024, H = 128, P = 4, and halves a program that would be longer
        than 12,000.
        """
        static = self.static
        is_cheap = static.policy == ExpSum() and static.soft_cap is None
        if is_cheap and not static.ranges.has_segments:
            return False
        seen = self.reach // tiles.GRAIN + 1
        here = self.block // tiles.GRAIN
        ramp = sum(min(n + 1, seen) for n in range(tiles.up(seen - 1, here)))
        return self.heads * (here * seen + ramp) > MOST_TILES

    @property
    def sink_rows(self) -> int:
        """Rows of a tile of sink tokens."""
        ranges = self.static.ranges
        if not ranges.num_sink_tokens:
            return 0
        if ranges.has_segments:
            return segments.sink_rows(ranges, self.block)
        return tiles.up(ranges.num_sink_tokens, 16)


def plan_of(static: Static, T: int, G: int) -> Plan:
    """Small windows fold heads, fewer the wider they are: the program grows with both.

    By bundles of gpt-oss (W = 128, G = 8) and W = 128, 256, 512 at H = 128, G = 4: 19, 17, 13 and 7 % less on
    v5e, 28 and 23 % on v6e, whose wider matrix unit gains nothing from W = 256 on.
    """
    narrow, block = tiles.layout(static.ranges, T, static.blocks.query_backward)
    heads = 1
    if narrow and static.ranges.window is not None:
        reach = tiles.reach(static.ranges.window)
        if reach == tiles.GRAIN or not static.blocks.wide_matmuls:
            heads = max(x for x in range(1, G + 1) if G % x == 0 and x * reach <= max(1024, reach))
    if heads > 1:
        _, block = tiles.layout(static.ranges, T, min(block, 256 if heads > 3 else 512))
    blocks = -(-T // block)
    return Plan(static, heads, G // heads, block, blocks, narrow, blocks)


@dataclasses.dataclass(frozen=True)
class Refs:
    """What a kernel reads, writes and keeps: `[heads, block, ..]` of queries, `[keys, ..]` of keys."""

    query: Any
    d_out: Any
    key: Any
    value: Any
    dq: Any
    dk: Any
    dv: Any
    scaled: Any
    dq_t: Any
    sum_key: Any  # the ring, or the sums of the whole head
    sum_value: Any
    log_denominator: Any = None
    delta: Any = None
    d_out_t: Any = None
    first_keys: Any = None  # packed rows: of each query of the block
    bounds: Any = None  # packed rows: of the first and of the last query of every block, in SMEM
    sink_key: Any = None
    sink_value: Any = None
    seen_by: Any = None  # packed rows: the range of queries that see each row of the sink tile
    sink_dk: Any = None
    sink_dv: Any = None

    @property
    def sink_sums(self):
        return () if self.sink_dk is None else (self.sink_dk, self.sink_dv)

    def rows(self, plan: Plan) -> Rows:
        return Rows(
            plan.static, plan.heads, plan.block, self.scaled, self.d_out, self.d_out_t,
            self.log_denominator, self.delta, self.dq_t,
        )  # fmt: skip


def backward(static: Static, query, key, value, d_out, log_denominator, delta, starts=None):
    """dq, dk and dv from the cotangent of the output.

    Args:
        query, key, value, d_out: `[B, N or K, T, H]`.
        log_denominator: of the forward pass, `[B, N, 1, T]`; None where the policy has none.
        delta: D − dL `[B, N, 1, T]`, D = sum(dO · O) and dL the cotangent of the log-sum-exp; or None.
        starts: `segments.starts_of` the ids `[B, 1, T]` in packed rows.
    """
    T, ranges = query.shape[2], static.ranges
    plan = plan_of(static, T, query.shape[1] // key.shape[1])
    block, length = plan.block, plan.blocks * plan.block
    query, key, value, d_out = (tiles.pad_axis(x, length, 2) for x in (query, key, value, d_out))
    rows = {}
    if static.policy.has_top:
        rows = {"log_denominator": log_denominator * LOG2_E, "delta": delta}
        rows = {name: tiles.pad_axis(x, length, 3) for name, x in rows.items()}
    gathered: Any = None
    if ranges.has_segments:
        assert starts is not None
        starts = jnp.pad(starts, ((0, 0), (0, 0), (0, length - T)), mode="edge")
        rows["first_keys"] = segments.first_keys(starts, ranges.window)
        if ranges.num_sink_tokens:
            gathered = segments.sink_tiles(starts, block, ranges)

    def of(first, keys_end, end):
        """The gradients by way of some keys, which the queries [first, end) see."""
        some = dataclasses.replace(
            plan, blocks=(end - first) // block, key_blocks=(keys_end - first) // block
        )
        seen = slice(first, end), slice(first, keys_end)
        mine = {name: x[..., seen[0]] for name, x in rows.items()}
        if ranges.has_segments:
            mine["first_keys"] = jnp.maximum(mine["first_keys"] - first, 0)
        tile = None
        if gathered is not None and first == 0:
            seen_by = jnp.stack([x.reshape(x.shape[0], -1) for x in gathered[1:]], 2)
            tile = seen_by, *(segments.gather(x, gathered.index) for x in (key, value))
        if first:
            other = dataclasses.replace(ranges, num_sink_tokens=0)
            some = dataclasses.replace(some, static=dataclasses.replace(static, ranges=other))
        q, do = (x[:, :, seen[0]] for x in (query, d_out))
        k, v = (x[:, :, seen[1]] for x in (key, value))
        return _call(some, q, k, v, do, mine, tile)

    cuts = _cuts(plan, key, value)
    if len(cuts) == 2:
        dq, dk, dv, *parts = of(0, length, length)
    else:
        # Sink tokens are among the first keys. dq is summed in float32 over the calls.
        dq, found = jnp.zeros(query.shape, jnp.float32), []
        for first, keys_end in itertools.pairwise(cuts):
            end = length
            if first and ranges.window is not None:
                end = min(end, tiles.up(keys_end + ranges.window - 1, block))
            one, *others = of(first, keys_end, end)
            dq, found = dq.at[:, :, first:end].add(one), [*found, others]
        dk, dv = (jnp.concatenate([x[n] for x in found], 2) for n in range(2))
        dq, parts = dq.astype(query.dtype), found[0][2:]
    if parts:
        dk = _add_rows(dk, gathered.index, parts[0] * (static.scale / static.fold))
        dv = _add_rows(dv, gathered.index, parts[1])
    return dq[:, :, :T], dk[:, :, :T], dv[:, :, :T]


def _cuts(plan: Plan, key, value) -> list[int]:
    """Where the keys of a head are cut, so that they and the sums of dk and dv fit into VMEM."""
    length = plan.blocks * plan.block
    if plan.narrow:
        return [0, length]
    wide = tiles.up(key.shape[-1]) + tiles.up(value.shape[-1])
    each = wide * (2 * key.dtype.itemsize + 4)  # two buffers of keys and values
    most = int(0.8 * tiles.VMEM_BYTES) // each  # the rest is for the query block and its scores
    calls = -(-length // max(most, plan.block))
    size = tiles.up(-(-length // calls), plan.block)
    return [*range(0, length, size), length]


def _call(plan: Plan, query, key, value, d_out, rows, tile):
    """dq, dk, dv, and what the rows of gathered sink tiles add to dk and dv, as rows.

    Args:
        key, value: of the first queries; later queries have keys of their own elsewhere.
        rows: by name, what is one number per query, `[B, N or 1, .., T]`.
        tile: in packed rows with sink tokens, the queries that see each row of it, its keys and values.
    """
    B, N, T, H = query.shape
    K, Hv, S = key.shape[1], value.shape[-1], key.shape[2]
    static, heads, turns, block, blocks = (
        plan.static, plan.heads, plan.turns, plan.block, plan.blocks
    )  # fmt: skip
    ranges, packed = static.ranges, static.ranges.has_segments
    number = plan.sink_rows

    def descending(i):
        return blocks - 1 - i

    def queries(*shape):  # of some heads
        def at(b, k, i, g):
            i = descending(i)
            return (b, k * turns + g, *((0, i) if shape[0] == 1 else (i, 0)))

        return pl.BlockSpec((None, heads, *shape), at)

    def finished(rows, width, of=blocks):
        def at(b, k, i, g):
            i = descending(i)
            return b, k, i if of == blocks else jnp.minimum(i, of - 1), 0

        return pl.BlockSpec((None, None, rows, width), at)

    def resident(rows, width):
        return pl.BlockSpec((None, None, rows, width), lambda b, k, i, g: (b, k, 0, 0))

    def span(rows, width):
        return pl.BlockSpec(
            (None, None, pl.Element(rows), pl.Element(width)),
            lambda b, k, i, g: (b, k, tiles.span_start(descending(i) * block - plan.reach), 0),
        )

    whole = S == T
    reads = {"query": (query, queries(block, H)), "d_out": (d_out, queries(block, Hv))}
    writes = {
        "dq": (query.shape, query.dtype if whole else jnp.float32, queries(block, H)),
        "dk": (key.shape, key.dtype, finished(block, H, plan.key_blocks)),
        "dv": (value.shape, value.dtype, finished(block, Hv, plan.key_blocks)),
    }
    keeps = {
        "scaled": pltpu.VMEM((heads * block, H), query.dtype),
        "dq_t": pltpu.VMEM((H, heads * block), jnp.float32),
    }
    if static.blocks.wide_matmuls:
        keeps["d_out_t"] = pltpu.VMEM((Hv, heads * block), query.dtype)
    row = pl.BlockSpec((None, 1, block), lambda b, k, i, g: (b, 0, descending(i)))
    for name, x in rows.items():
        reads[name] = x, row if name == "first_keys" else queries(1, block)
    length, sums, keys = S, (S,), resident
    if plan.narrow:
        length, sums, keys = min(plan.reach + block, T), (-(-plan.reach // block) + 1, block), span
    elif packed:
        bounds = rows["first_keys"]
        bounds = jnp.concatenate([bounds[..., ::block], bounds[..., block - 1 :: block]], axis=1)
        reads["bounds"] = bounds, pl.BlockSpec(memory_space=pltpu.SMEM)
    for name, x in (("key", key), ("value", value)):
        width = x.shape[-1]
        reads[name] = x, keys(length, width)
        keeps["sum_" + name] = pltpu.VMEM((*sums, width), jnp.float32)
    if tile is not None:
        two = pl.BlockSpec((None, number, 2), lambda b, k, i, g: (b, descending(i), 0))
        reads["seen_by"] = tile[0], two
        for name, x in zip(("key", "value"), tile[1:], strict=True):
            reads["sink_" + name] = x, finished(number, x.shape[-1])
            writes["sink_d" + name[0]] = x.shape, jnp.float32, finished(number, x.shape[-1])
    elif number and plan.narrow:
        for name, x in (("key", key), ("value", value)):
            reads["sink_" + name] = x, resident(number, x.shape[-1])
            keeps["sink_d" + name[0]] = pltpu.VMEM((number, x.shape[-1]), jnp.float32)

    names, kernel = (*reads, *writes, *keeps), span_kernel if plan.narrow else loop_kernel
    operands = [x for x, _ in reads.values()]
    pairs = B * N * (ranges.pairs(T) - (0 if whole else ranges.pairs(T - S)))
    moved = 2 * query.size + d_out.size + 2 * key.size + 2 * value.size
    return pl.pallas_call(
        lambda *refs: kernel(plan, Refs(**dict(zip(names, refs, strict=True)))),
        grid=(B, K, blocks, turns),
        in_specs=[spec for _, spec in reads.values()],
        out_specs=[spec for _, _, spec in writes.values()],
        out_shape=[varying.struct(s, dtype, operands) for s, dtype, _ in writes.values()],
        scratch_shapes=list(keeps.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (3 * H + 2 * Hv),
            transcendentals=pairs,
            bytes_accessed=moved * query.dtype.itemsize + 8 * B * N * T * static.policy.has_top,
        ),
        name="sinkjax_flash_backward",
        interpret=static.interpret,
    )(*operands)


def _add_rows(x, index, parts):
    """x `[B, K, T, H]` with `parts` `[B, K, R, H]` added at `index` `[B, R]`, summed in float32.

    Many blocks see one sink token; the sum is taken over the rows of `parts`, not over those of x, which
    may be bfloat16.
    """
    number = jnp.arange(index.shape[1], dtype=jnp.int32)

    def one(x, index, parts):
        row = jnp.full(x.shape[1], index.shape[0], jnp.int32).at[index].min(number)[index]
        total = jnp.zeros_like(parts).at[:, row].add(parts)[:, row]
        return x.at[:, index].set((x[:, index] + total).astype(x.dtype))

    return jax.vmap(one)(x, index, parts)
