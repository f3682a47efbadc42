"""The TPU kernel of decode attention: a row's ring of keys and values goes through VMEM once.

A grid step is a chunk of slots of one row of the batch, for several key/value heads at once. Chunks that
hold nothing visible are neither fetched nor looked at. A new token is joined to the scores as they
are computed, so that only the tile of its slot is written back, into the cache's own memory.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels.decode import int8
from sinkjax_kernels.decode import running as weights
from sinkjax_kernels.flash.tpu_tiles import dot, up
from sinkjax_kernels.normalizers import Normalizer
from sinkjax_kernels.varying import alike, struct

LANES = 128
VMEM_BYTES = 48 * 2**20
TILE = {1: 32, 2: 16, 4: 8}  # rows of a tile of memory, by bytes of an element
_LEAF_OUT = {n: n + "_out" for n in ("key", "value", "key_scale", "value_scale")}


@dataclasses.dataclass(frozen=True)
class Ring:
    """Everything a compiled program depends on besides shapes.

    Args:
        slots: C, of which a grid step takes `chunk` of `heads` key/value heads out of `all_heads`.
        sink_slots: leading slots that are exempt from the window, and met by `sink_query` where given.
        skips: whether chunks that hold nothing visible are passed over.
        flipped: which of `key` and `value` come as `[B, K, H, C]`, slots in lanes.
    """

    normalizer: Normalizer
    scale: float
    soft_cap: float | None
    window: int | None
    sink_tokens: int
    sink_slots: int
    tokens: int
    slots: int
    chunk: int
    heads: int
    all_heads: int
    skips: bool
    flipped: frozenset[str] = frozenset()
    interpret: Any = False

    @property
    def chunks(self) -> int:
        return -(-self.slots // self.chunk)


def attend(ring: Ring, operands: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs by name: out `[B, K, R, Hv]`, lse `[B, K / heads, R, heads]`, and the leaves written to.

    Args:
        operands: `query` and `sink_query` `[B, K, R, H]` with rows r = t · G + g; `positions`
            `[B, #K, C]`; `key`, `value`; `key_scale`, `value_scale`; `new_key`, `new_value`
            `[B, K, H]`; `sink` and the leaves of the normaliser, `[1, 1, N]` or `[B, 1, T · N]`. In
            SMEM and flat: `clock` `[B · T]`, `slot` `[B]`, and `order`, what `visits` gives, where
            `skips`. Those that a call does not have are left out.
    """
    operands = alike(dict(operands))
    scalars = [n for n in ("clock", "slot", "order") if n in operands]
    inputs = [n for n in operands if n not in scalars]
    query, key, value = (operands[n] for n in ("query", "key", "value"))
    (B, K, R, H), Hv = query.shape, value.shape[2 if "value" in ring.flipped else 3]
    heads, chunk, chunks = ring.heads, ring.chunk, ring.chunks
    tables = operands["order"].size // (B * chunks) if ring.skips else 0

    def visited(scalar, b, k, j):
        return _visited(ring, tables, scalar, b, k, j)

    def block(shape, index):
        def at(*point_and_refs):
            (b, k, j), refs = point_and_refs[:3], point_and_refs[3:]
            return index(dict(zip(scalars, refs, strict=True)), b, k, j)

        return pl.BlockSpec(shape, at)

    def leaf(name):
        if name in ring.flipped:
            shape = (None, heads, operands[name].shape[2], chunk)
            return block(shape, lambda s, b, k, j: (b, k, 0, visited(s, b, k, j)))
        shape = (None, heads, chunk, operands[name].shape[3])
        return block(shape, lambda s, b, k, j: (b, k, visited(s, b, k, j), 0))

    def lane_leaf(count):
        """Per slot and head, or per slot: slots are lanes."""
        return block(
            (None, heads if count == K else 1, chunk),
            lambda s, b, k, j: (b, k if count == K else 0, visited(s, b, k, j)),
        )

    def per_head(*sizes):
        zeros = (0,) * len(sizes)
        return block((None, heads, *sizes), lambda s, b, k, j: (b, k, *zeros))

    def specs_of(name):
        x = operands[name]
        match name:
            case "key" | "value":
                return leaf(name)
            case "key_scale" | "value_scale" | "positions":
                return lane_leaf(x.shape[1])
            case "query" | "sink_query" | "new_key" | "new_value":
                return per_head(*x.shape[2:])
            case _:
                is_batched = x.shape[0] > 1
                return block(
                    (None, 1, x.shape[2]), lambda s, b, k, j: (b if is_batched else 0, 0, 0)
                )

    def tile_at(size, s, b, k):
        """The tile with the slot that is written, or one that is written back as it is."""
        slot = s["slot"][b]
        some = visited(s, b, k, 0) * (chunk // size)
        return jnp.where(_is_slot(ring, slot), jax.lax.div(slot, size), some)

    def written(name):
        x = operands[name]
        if x.ndim == 3:
            return block((None, heads, LANES), lambda s, b, k, j: (b, k, tile_at(LANES, s, b, k)))
        if name in ring.flipped:
            shape = (None, heads, x.shape[2], LANES)
            return block(shape, lambda s, b, k, j: (b, k, 0, tile_at(LANES, s, b, k)))
        rows = TILE[x.dtype.itemsize]
        return block(
            (None, heads, rows, x.shape[-1]), lambda s, b, k, j: (b, k, tile_at(rows, s, b, k), 0)
        )

    every = tuple(operands.values())
    outputs = {"out": (per_head(R, Hv), struct((B, K, R, Hv), query.dtype, *every))}
    if ring.normalizer.has_log_sum_exp:
        outputs["lse"] = (
            block((None, None, R, heads), lambda s, b, k, j: (b, k, 0, 0)),
            struct((B, K // heads, R, heads), jnp.float32, *every),
        )
    changed = [n for n in _LEAF_OUT if n in operands] if "slot" in operands else []
    for name in changed:
        x = operands[name]
        outputs[name] = (written(name), struct(x.shape, x.dtype, *every))
    scratch = {}
    if chunks > 1:
        scratch = {
            "top": pltpu.VMEM((heads, R, LANES), jnp.float32),
            "total": pltpu.VMEM((heads, R, LANES), jnp.float32),
            "acc": pltpu.VMEM((heads, R, Hv), jnp.float32),
        }
    order = [*scalars, *inputs]
    names = [*order, *(_LEAF_OUT.get(n, n) for n in outputs), *scratch]
    results = pl.pallas_call(
        partial(_kernel, ring, tables, names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, K // heads, chunks),
            in_specs=[specs_of(n) for n in inputs],
            out_specs=[spec for spec, _ in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for _, shape in outputs.values()],
        input_output_aliases={order.index(n): list(outputs).index(n) for n in changed},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * K * R * ring.slots * (H + Hv),
            transcendentals=B * K * R * ring.slots,
            bytes_accessed=sum(operands[n].size * operands[n].dtype.itemsize for n in inputs),
        ),
        name="sinkjax_decode",
        interpret=ring.interpret,
    )(*(operands[n] for n in order))
    return dict(zip(outputs, results, strict=True))


def visits(seen, slot, ring: Ring):
    """The chunk of each grid step, flat `[B, rows, chunks]`: its own, or the next that is visited.

    Args:
        seen: visible slots `[B, rows, C]`, rows being 1 or the groups of heads of a grid step.
        slot: the slot written to `[B]` or None; its chunk is visited in any case.

    A block that stays the same is not fetched again: after the last visited chunk it is repeated.
    """
    B, rows, C = seen.shape
    padded = jnp.pad(seen, ((0, 0), (0, 0), (0, ring.chunks * ring.chunk - C)))
    wanted = padded.reshape(B, rows, ring.chunks, ring.chunk).any(axis=-1)
    index = jnp.arange(ring.chunks, dtype=jnp.int32)
    if slot is not None:
        here = _is_slot(ring, slot)[:, None] & (jax.lax.div(slot, ring.chunk)[:, None] == index)
        wanted |= here[:, None]
    last = jnp.where(wanted, index, 0).max(axis=-1)[..., None]
    is_next = wanted[..., None, :] & (index >= index[:, None])
    return jnp.minimum(jnp.where(is_next, index, ring.chunks).min(axis=-1), last).ravel()


def _visited(ring: Ring, tables: int, scalar, b, k, j):
    """The chunk of grid step (b, k, j)."""
    if not ring.skips:
        return j
    row = b * tables + (0 if tables == 1 else k)
    return scalar["order"][row * ring.chunks + j]


def _is_slot(ring: Ring, slot):
    return (slot >= 0) & (slot < ring.slots)


def _kernel(ring: Ring, tables: int, names, *refs):
    at = dict(zip(names, refs, strict=True))
    b, k, j = (pl.program_id(axis) for axis in range(3))
    begins = _visited(ring, tables, at, b, k, 0)
    if ring.chunks == 1:
        _absorb(ring, at, b, k, j, True)
        return
    pl.when(j == 0)(partial(_begin, ring, at, k))
    absorb = partial(_absorb, ring, at, b, k, j, j == begins)
    if ring.skips:
        pl.when(j == _visited(ring, tables, at, b, k, j))(absorb)
    else:
        absorb()

    @pl.when(j == ring.chunks - 1)
    def _():
        _end(ring, at, at["top"][:, :, :1], at["total"][:, :, :1], at["acc"][...])


def _begin(ring: Ring, at, k) -> None:
    top, total = _start(ring, at, _columns(ring, at, k))
    at["top"][...] = jnp.broadcast_to(top, at["top"].shape)
    at["total"][...] = jnp.broadcast_to(total, at["total"].shape)
    at["acc"][...] = jnp.zeros(at["acc"].shape, jnp.float32)


def _start(ring: Ring, at, columns):
    return weights.begin(ring.normalizer, at["query"].shape[:2], columns.get("sink"))


def _of_token(rows: int, numbers):
    """The number of the token of each row, as a column; itself where there is one token."""
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    found = numbers[0]
    for t in range(1, len(numbers)):
        found = jnp.where(row >= t * (rows // len(numbers)), numbers[t], found)
    return found


def _columns(ring: Ring, at, k) -> dict[str, Any]:
    """The sink logit and the learned leaves of each row; they come as one row for all heads."""
    heads, rows, _ = at["query"].shape
    G = rows // ring.tokens
    found = {}
    for name in ("sink", *ring.normalizer.parameters):
        if name not in at:
            continue
        numbers = at[name][...]
        shape = (heads, rows, numbers.shape[1])
        N = ring.all_heads * G
        skip = N - G if shape[2] > N else -G
        head, row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
        own = row + _of_token(rows, [t * skip for t in range(ring.tokens)])
        here = lane == own + (k * heads + head) * G
        found[name] = jnp.where(here, numbers, 0.0).sum(axis=-1, keepdims=True)
    return found


def _end(ring: Ring, at, top, total, acc) -> None:
    out, lse = weights.end(ring.normalizer, top, total, acc)
    at["out"][...] = out.astype(at["out"].dtype)
    if lse is not None:
        for h in range(lse.shape[0]):
            at["lse"][:, h : h + 1] = lse[h]


def _apart(x):
    """`[heads, n]` as `[heads, 1, n]`."""
    return jnp.stack([x[h : h + 1, :] for h in range(x.shape[0])])


def _absorb(ring: Ring, at, b, k, chunk, is_first) -> None:
    """The chunk in VMEM joins the state of its rows, or with one chunk becomes the output.

    Why: heads side by side, a product each; what is between the products is done for all of them at
    once, so that the latency of one hides behind the others.
    """
    C, size, is_whole = ring.slots, ring.chunk, ring.chunks == 1
    heads, rows, _ = at["query"].shape
    first = chunk * size
    slots = first + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    is_cut = C % size > 0
    if is_cut:  # whatever lies after the cache may not reach a product: 0 · NaN is NaN
        pl.when(first + size > C)(partial(_clear, ring, at["value"], C % size))
    fresh = None
    if "slot" in at:
        fresh = jnp.where(_is_slot(ring, at["slot"][b]), at["slot"][b], -1)
        is_here = jax.lax.div(fresh, size) == chunk
        pl.when(jnp.where(fresh < 0, is_first, is_here))(partial(_write, ring, at, fresh, first))
        new = {name: [_apart(x) for x in _new(at, name)] for name in ("key", "value")}
    clock = _of_token(rows, [at["clock"][b * ring.tokens + t] for t in range(ring.tokens)])

    logits = jnp.stack([_scores(ring, at, slots, h) for h in range(heads)])
    if "key_scale" in at:
        logits = logits * _apart(at["key_scale"][...])
    if fresh is not None:
        logits = jnp.where(slots == fresh, _score_new(ring, at, fresh, *new["key"]), logits)
    logits = logits * ring.scale
    if ring.soft_cap is not None:
        logits = ring.soft_cap * jnp.tanh(logits / ring.soft_cap)
    key = _apart(at["positions"][...])
    seen = (key >= 0) & (key <= clock)
    if ring.window is not None:
        near = (key < ring.sink_tokens) | (clock - key < ring.window)
        seen &= near | (slots < ring.sink_slots) if ring.sink_slots else near
    if is_cut:
        seen &= slots < C

    columns = _columns(ring, at, k)
    if is_whole:
        (old, total), acc = _start(ring, at, columns), 0.0
    else:
        old, total, acc = at["top"][:, :, :1], at["total"][:, :, :1], at["acc"][...]
    top, weight, counted = weights.weigh(ring.normalizer, logits, seen, old, columns)
    if weights.shifts(ring.normalizer):
        rescale = jnp.exp(old - top)
        total, acc = total * rescale, acc * rescale
    if counted is not None:
        total = total + counted.sum(axis=-1, keepdims=True)
    if fresh is not None:
        token, step = new["value"]
        share = jnp.where(slots == fresh, weight, 0.0).sum(axis=-1, keepdims=True)
        acc = acc + share * (token * step)
        weight = jnp.where(slots == fresh, 0.0, weight)
    if "value_scale" in at:
        step = _apart(at["value_scale"][...])
        weight = weight * (jnp.where(slots < C, step, 0.0) if is_cut else step)
    kind = _common(at["query"].dtype, at["value"].dtype)
    weight = weight.astype(kind)
    contract = (1, 1 if "value" in ring.flipped else 0)
    values = [dot(weight[h], at["value"][h].astype(kind), contract) for h in range(heads)]
    acc = acc + jnp.stack(values)
    if is_whole:
        _end(ring, at, top, total, acc)
    else:
        at["top"][...] = jnp.broadcast_to(top, at["top"].shape)
        at["total"][...] = jnp.broadcast_to(total, at["total"].shape)
        at["acc"][...] = acc


def _scores(ring: Ring, at, slots, h: int):
    """Products of the rows of a head with the keys in VMEM, those of sink slots with their own query."""
    key, size, is_flipped = at["key"][h], ring.chunk, "key" in ring.flipped
    found = _product(at["query"][h], key, is_flipped)
    if "sink_query" not in at:
        return found
    width = min(up(ring.sink_slots, LANES), size)
    first = key[:, :width] if is_flipped else key[:width]
    sink = _product(at["sink_query"][h], first, is_flipped)
    sink = jnp.where(slots[:, :width] < ring.sink_slots, sink, found[:, :width])
    return sink if width == size else jnp.concatenate([sink, found[:, width:]], axis=1)


def _common(query, leaf):
    """What a product with a leaf is computed in: int8 is exact in every float type."""
    return query if leaf == jnp.int8 else jnp.promote_types(query, leaf)


def _product(query, key, is_flipped: bool):
    kind = _common(query.dtype, key.dtype)
    return dot(query.astype(kind), key.astype(kind), (1, 0 if is_flipped else 1))


def _new(at, name: str):
    """The new token as it is stored, as numbers in float32 `[heads, H]`, and their scale `[heads, 1]`."""
    token = at["new_" + name][...]
    if name + "_scale" not in at:
        token = token.astype(at[name].dtype).astype(jnp.float32)
        return token, jnp.ones((token.shape[0], 1), jnp.float32)
    whole, scale = int8.quantize(token)
    return whole.astype(jnp.float32), scale[:, None]


def _score_new(ring: Ring, at, fresh, token, step):
    """The new token's product with each row, as columns."""
    query = at["query"][...].astype(jnp.float32)
    if "sink_query" in at:
        query = jnp.where(fresh < ring.sink_slots, at["sink_query"][...].astype(jnp.float32), query)
    return (query * token).sum(axis=-1, keepdims=True) * step


def _clear(ring: Ring, value, start: int) -> None:
    """Zeros from slot `start` of the chunk on."""
    is_flipped, size = "value" in ring.flipped, ring.chunk
    whole = up(start, LANES)

    def part(h, begin, end):
        slots = slice(begin, end)
        return (h, slice(None), slots) if is_flipped else (h, slots, slice(None))

    for h in range(ring.heads):
        if whole > start:
            edge = value[part(h, whole - LANES, whole)].astype(jnp.float32)
            slot = jax.lax.broadcasted_iota(jnp.int32, edge.shape, 1 if is_flipped else 0)
            edge = jnp.where(slot < start - (whole - LANES), edge, 0.0)
            value[part(h, whole - LANES, whole)] = edge.astype(value.dtype)
        if whole < size:
            rest = part(h, whole, size)
            value[rest] = jnp.zeros(value[rest].shape, value.dtype)


def _write(ring: Ring, at, fresh, first) -> None:
    """The tile of the slot, the new token in its row; without a slot some tile as it is."""
    for name in ("key", "value"):
        leaf, out = at[name], at[_LEAF_OUT[name]]
        token, step = _new(at, name)
        is_flipped = name in ring.flipped
        size = out.shape[2] if is_flipped else out.shape[1]
        row, start = _within(fresh - first, size)
        here = jax.lax.broadcasted_iota(jnp.int32, out.shape[1:], int(is_flipped)) == row
        for h in range(out.shape[0]):
            mine = token[h : h + 1, :]
            if is_flipped:
                mine, old = _column(mine), leaf[h, :, pl.ds(start, size)]
            else:
                old = leaf[h, pl.ds(start, size), :]
            out[h] = jnp.where(here, mine, old.astype(jnp.float32)).astype(out.dtype)
        scale = at.get(name + "_scale")
        if scale is not None:
            out = at[_LEAF_OUT[name + "_scale"]]
            lane, start = _within(fresh - first, LANES)
            here = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1) == lane
            out[...] = jnp.where(here, step, scale[:, pl.ds(start, LANES)])


def _column(row):
    """`[1, n]` as `[n, 1]`."""
    n = row.shape[1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return jnp.where(i == j, row, 0.0).sum(axis=1, keepdims=True)


def _within(slot, size: int):
    """Row inside its tile, and the tile's first slot; (negative, 0) of no slot."""
    start = pl.multiple_of(jax.lax.div(jnp.maximum(slot, 0), size) * size, size)
    return slot - start, start
