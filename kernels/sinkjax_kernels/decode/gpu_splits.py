"""The GPU kernel of decode attention: each program takes some slots of a ring, and XLA merges them.

A few queries alone would keep a few multiprocessors busy, so the slots of a row are split among
programs. Each starts without a sink and leaves its running state (`running`), which add up.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import div, rem

from sinkjax_kernels.decode import running as weights
from sinkjax_kernels.flash.gpu_tiles import padded, power_of_2
from sinkjax_kernels.normalizers import Normalizer, Softmax, constant_sink
from sinkjax_kernels.varying import alike, struct


@dataclasses.dataclass(frozen=True)
class Splits:
    """Everything a compiled program depends on besides shapes.

    Args:
        sink_slots: leading slots that are exempt from the window, and met by `sink_query` where given.
        slots: C, of which a program takes `size`, `block` at a time.
        tokens: T, the query tokens.
        rows: query rows of a program.
    """

    normalizer: Normalizer
    scale: float
    soft_cap: float | None
    window: int | None
    sink_tokens: int
    sink_slots: int
    slots: int
    size: int
    block: int
    tokens: int
    rows: int
    interpret: bool = False

    @property
    def count(self) -> int:
        return -(-self.slots // self.size)

    @property
    def without_sink(self) -> Normalizer:
        """The normaliser of a part: a constant sink is added to the whole."""
        return self.normalizer if constant_sink(self.normalizer) is None else Softmax()

    def dot(self, a, b, contract: tuple[int, int]):
        """A product in float32 of two tiles of one dtype."""
        precision = None
        if b.dtype == jnp.float32:
            # Three TF32 products are as good as float32; interpreters on CPU know the word HIGHEST.
            three = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = jax.lax.Precision.HIGHEST if self.interpret else three
        return jax.lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


def attend(splits: Splits, operands: dict[str, Any], sink):
    """The output `[B, K, R, Hv]` in float32, and the log-sum-exp `[B, K, R]` or None.

    Args:
        operands: `clock` `[B, T]`; `query` and `sink_query` `[B, K, R, H]` with rows r = t · G + g;
            `positions` `[B, #K, C]`; `key`, `value`; `key_scale`, `value_scale`; `learned`, by name
            `[K, R]`. What a call does not have is None.
        sink: sink logits `[#B, K, R]` or None.
    """
    operands = alike(operands)
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    (B, K, R, H), (C, Hv) = query.shape, value.shape[2:]
    room = splits.count * splits.size
    rows = splits.rows

    def heads(bk):
        return div(bk, K), rem(bk, K)

    def of_rows(*sizes):
        return pl.BlockSpec(
            (None, None, rows, *sizes), lambda i, _, j: (*heads(i), j, *_zeros(sizes))
        )

    def of_slots(x, *sizes):
        is_shared = x.shape[1] == 1  # positions of all heads

        def place(i, _, j):
            b, k = heads(i)
            return (b, 0 if is_shared else k, 0, *_zeros(sizes))

        return pl.BlockSpec((None, None, room, *sizes), place)

    def spec(name, x):
        match name:
            case "clock":
                return pl.BlockSpec((None, splits.tokens), lambda i, _, j: (div(i, K), 0))
            case "query" | "sink_query":
                return of_rows(padded(H))
            case "key" | "value":
                return of_slots(x, padded(x.shape[-1]))
            case "learned":
                each = pl.BlockSpec((None, rows), lambda i, _, j: (rem(i, K), j))
                return {name: each for name in x}
        return of_slots(x)

    def part(*sizes):
        """Of the rows and the split: a result, and where in it the program writes."""
        place = pl.BlockSpec(
            (None, None, None, rows, *map(padded, sizes)),
            lambda i, s, j: (*heads(i), s, j, *_zeros(sizes)),
        )
        shape = (B, K, splits.count, R, *sizes)
        return place, struct(shape, jnp.float32, *jax.tree.leaves(operands))

    places, shapes = zip(part(), part(), part(Hv), strict=True)
    given = {name: x for name, x in operands.items() if x is not None}
    top, total, acc = pl.pallas_call(
        partial(_kernel, splits, (R, H, Hv)),
        grid=(B * K, splits.count, -(-R // rows)),
        in_specs=[{name: spec(name, x) for name, x in given.items()}],
        out_specs=places,
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * K * R * C * (H + Hv),
            transcendentals=B * K * R * C,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((given, shapes))),
        ),
        name="sinkjax_decode",
        interpret=splits.interpret,
    )(given)
    return _merge(splits.normalizer, top, total, acc, sink)


def _zeros(sizes) -> tuple[int, ...]:
    return (0,) * len(sizes)


def _merge(normalizer: Normalizer, top, total, acc, sink):
    """The parts `[B, K, splits, R]` as one, the sink with them: they add up once they have one `top`."""
    constant = constant_sink(normalizer)
    if constant is not None:
        sink = jnp.float32(constant)
    if weights.shifts(normalizer):
        highest = top.max(axis=2)
        if sink is not None:
            highest = jnp.maximum(highest, sink)
        factor = jnp.exp(top - highest[:, :, None])
        total, acc = total * factor, acc * factor[..., None]
    else:
        highest = top[:, :, 0]
    total, acc = total.sum(axis=2), acc.sum(axis=2)
    if sink is not None:
        total = total + jnp.exp(sink - highest)
    out, lse = weights.end(normalizer, highest[..., None], total[..., None], acc)
    return out, None if lse is None else lse[..., 0]


def _kernel(splits: Splits, sizes: tuple[int, int, int], at, top_ref, total_ref, acc_ref):
    (R, H, Hv), rows, block = sizes, splits.rows, splits.block
    row = pl.program_id(2) * rows + jnp.arange(rows)
    inside = row < R
    first = pl.program_id(1) * splits.size
    token = jnp.minimum(div(row, R // splits.tokens), splits.tokens - 1)
    clock = plt.load(at["clock"].at[token], mask=inside, other=-1)
    low, high = _extent(splits, at, first, clock)
    clock = clock[:, None]

    def query(name):
        return _tile(at[name], 0, inside, H, rows)

    learned = {
        name: plt.load(ref, mask=inside, other=0)[:, None]
        for name, ref in at.get("learned", {}).items()
    }
    queries = query("query")

    def visit(sink_queries, n, carry):
        top, total, acc = carry
        start = first + n * block
        slots = start + jnp.arange(block)
        is_slot = None if splits.slots % block == 0 else slots < splits.slots
        keys = _tile(at["key"], start, is_slot, H, block)
        kind = _common(queries.dtype, keys.dtype)

        def product(rows):
            return splits.dot(rows.astype(kind), keys.astype(kind), (1, 1))

        logits = product(queries)
        if sink_queries is not None:
            logits = jnp.where(slots[None] < splits.sink_slots, product(sink_queries), logits)
        if "key_scale" in at:
            logits = logits * _numbers(at["key_scale"], start, is_slot, block)[None]
        logits = logits * splits.scale
        if splits.soft_cap is not None:
            logits = splits.soft_cap * jnp.tanh(logits / splits.soft_cap)
        seen = _visible(splits, clock, _positions(splits, at, start, block)[None], slots[None])
        old = top
        top, weight, counted = weights.weigh(splits.without_sink, logits, seen, old, learned)
        if weights.shifts(splits.normalizer):
            rescale = jnp.exp(old - top)
            total, acc = total * rescale, acc * rescale
        if counted is not None:
            total = total + counted.sum(axis=1, keepdims=True)
        values = _tile(at["value"], start, is_slot, Hv, block)
        if "value_scale" in at:
            weight = weight * _numbers(at["value_scale"], start, is_slot, block)[None]
        kind = _kind_of_weights(splits, queries.dtype, values.dtype)
        return top, total, acc + splits.dot(weight.astype(kind), values.astype(kind), (1, 0))

    top, total = weights.begin(splits.without_sink, (rows,), None)
    carry = top, total, jnp.zeros((rows, padded(Hv)), jnp.float32)
    if "sink_query" in at:
        # Only the first blocks of the first split have sink slots.
        sink_blocks = jnp.clip(pl.cdiv(splits.sink_slots - first, block), 0, splits.size // block)
        edge = jnp.clip(sink_blocks, low, high)
        carry = jax.lax.fori_loop(low, edge, partial(visit, query("sink_query")), carry)
        low = edge
    top, total, acc = jax.lax.fori_loop(low, high, partial(visit, None), carry)
    plt.store(top_ref, top[:, 0], mask=inside)
    plt.store(total_ref, total[:, 0], mask=inside)
    columns = jnp.arange(padded(Hv)) < Hv
    plt.store(acc_ref, acc, mask=inside[:, None] & columns[None])


def _extent(splits: Splits, at, first, clock):
    """The blocks of the split from the first visible slot to the last, as a range."""
    slots = jnp.arange(power_of_2(splits.size))
    keys = _positions(splits, at, first, power_of_2(splits.size), splits.size)
    latest = clock.max()
    earliest = jnp.where(clock < 0, latest, clock).min()
    near = (keys >= 0) & (keys <= latest)
    if splits.window is not None:
        near &= _is_sink(splits, keys, first + slots) | (earliest - keys < splits.window)
    low = jnp.where(near, slots, splits.size).min()
    high = jnp.where(near, slots + 1, 0).max()
    low = div(low, splits.block)
    return low, jnp.maximum(low, div(high + splits.block - 1, splits.block))


def _visible(splits: Splits, query, key, slot):
    is_past = key < query if splits.normalizer.excludes_self else key <= query
    seen = (key >= 0) & is_past
    if splits.window is None:
        return seen
    return seen & (_is_sink(splits, key, slot) | (query - key < splits.window))


def _is_sink(splits: Splits, key, slot):
    by_position = key < splits.sink_tokens
    return by_position | (slot < splits.sink_slots) if splits.sink_slots else by_position


def _positions(splits: Splits, at, start, count: int, most: int | None = None):
    """Positions of slots from `start` on; −1 beyond the cache, and from the slot `most` of them on."""
    slots = start + jnp.arange(count)
    inside = slots < splits.slots
    if most is not None:
        inside &= jnp.arange(count) < most
    return plt.load(at["positions"].at[pl.ds(start, count)], mask=inside, other=-1)


def _tile(ref, start, inside, width: int, count: int):
    """`[count, padded width]` from row `start` on, 0 where a row is not `inside` (None: all are)."""
    mask = None if inside is None else inside[:, None]
    if width < ref.shape[1]:
        columns = (jnp.arange(ref.shape[1]) < width)[None]
        mask = columns if mask is None else mask & columns
    tile = ref.at[pl.ds(start, count), :]
    return plt.load(tile) if mask is None else plt.load(tile, mask=mask, other=0)


def _numbers(ref, start, inside, count: int):
    numbers = ref.at[pl.ds(start, count)]
    return plt.load(numbers) if inside is None else plt.load(numbers, mask=inside, other=0)


def _common(query, leaf):
    """What a product with a leaf is computed in: int8 is exact in every float type."""
    return query if leaf == jnp.int8 else jnp.promote_types(query, leaf)


def _kind_of_weights(splits: Splits, query, leaf):
    """What weights are rounded to for the product with the values."""
    kind = _common(query, leaf)
    if kind == jnp.float16:
        # Scaled weights may be small, and those that are no shares of 1 large.
        is_share = weights.shifts(splits.normalizer) and leaf != jnp.int8
        return kind if is_share else jnp.float32
    return kind
