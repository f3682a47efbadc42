"""Decode attention on TPU: each key and value is read once, and a new token is written where it lies.

`tpu_ring` holds the kernel, `running` the families of normalisers.

Leaves are read as XLA lays them out between compiled steps: head sizes that are multiples of 128 as they
lie, others with their slots in lanes. For the former that takes a number of slots that is a multiple of 8;
with another one XLA puts the heads inside the slots, and copies the cache before and after every step.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import reference
from sinkjax_kernels.decode.reference import Step, visible
from sinkjax_kernels.decode.refusals import check_operands
from sinkjax_kernels.decode.tpu_ring import LANES, Ring, attend, visits

DTYPES = "float32", "bfloat16"
MOST_ROWS = 128
STEP_BYTES = 4 * 2**20
STEP_SCORES = 2**18  # what lies between the products is unrolled: more would make a long program
WORTH_SKIPPING = 8  # chunks: to find out which of them are empty costs what it takes to fetch a few


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B #K S"],
    sink_query: Float[Array, "B T N H"] | None = None,
    num_sink_slots: int = 0,
    num_sink_tokens: int = 0,
    window: int | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: normalizers.Normalizer,
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float,
    logits_soft_cap: float | None = None,
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    chunk: int | None = None,
    skip: bool | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`decode.reference.decode_attention` on a TPU.

    Args:
        chunk: slots of a grid step, a multiple of 128; None chooses.
        skip: whether to look for chunks without a visible slot, which are not fetched then; None does
            so for caches of many chunks.
        interpret: True or `pltpu.InterpretParams()` to run on any backend.

    Raises:
        NotImplementedError: the call is not one of these, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    arrays = {
        "query": query, "key": key, "value": value, "query_positions": query_positions,
        "key_positions": key_positions, "sink_query": sink_query, "sinks": sinks,
        "normalizer_params": normalizer_params, "key_scale": key_scale, "value_scale": value_scale,
    }  # fmt: skip
    static = {
        "num_sink_slots": num_sink_slots, "num_sink_tokens": num_sink_tokens, "window": window,
        "normalizer": normalizer, "scale": scale, "logits_soft_cap": logits_soft_cap,
    }  # fmt: skip
    check(bias=bias, chunk=chunk, interpret=interpret, **arrays, **static)

    def kernel(arrays):
        step = _run(**arrays, **static, chunk=chunk, skip=skip, interpret=interpret)
        return step.out, step.lse

    def specification(arrays):
        return reference.decode_attention(**arrays, **static)

    return _differentiable(kernel, specification, arrays)


def decode_step(
    query: Float[Array, "B 1 N H"],
    new_key: Float[Array, "B 1 K H"],
    new_value: Float[Array, "B 1 K Hv"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    slots: Int[Array, " B"],
    query_positions: Int[Array, "B 1"],
    key_positions: Int[Array, "B #K S"],
    **options: Any,
) -> Step:
    """`decode.reference.decode_step` on a TPU; of the cache only the tile of a slot is written.

    The leaves are updated in place where the caller gives them up (`jax.jit(…, donate_argnums=…)`).

    Args:
        options: of `decode_attention`.
    """
    own = {name: options.pop(name) for name in ("chunk", "skip", "interpret") if name in options}
    check(query, key, value, key_positions=key_positions, **options, **own)
    B, N, K = query.shape[0], query.shape[2], key.shape[1]
    expected = (B, 1, K, key.shape[3]), (B, 1, K, value.shape[3])
    if query.shape[1] != 1 or (new_key.shape, new_value.shape) != expected:
        raise ValueError(
            f"query, new_key, new_value: expected {[B, 1, N, key.shape[3]]}, {list(expected[0])}, "
            f"{list(expected[1])}, got {list(query.shape)}, {list(new_key.shape)}, "
            f"{list(new_value.shape)}"
        )
    options.pop("bias", None)
    arrays = {
        "query": query, "new_key": new_key, "new_value": new_value, "key": key, "value": value,
        "slots": slots, "query_positions": query_positions, "key_positions": key_positions,
    }  # fmt: skip
    names = ("sink_query", "sinks", "normalizer_params", "key_scale", "value_scale")
    arrays |= {name: options.pop(name) for name in names if name in options}
    return _differentiable(
        lambda arrays: _run(**arrays, **options, **own),
        lambda arrays: reference.decode_step(**arrays, **options),
        arrays,
    )


def check(query, key, value, *, chunk: int | None = None, **options: Any) -> None:
    """Raises for a call that `decode_attention` or `decode_step` with these options does not serve.

    Arrays may be traced or `jax.ShapeDtypeStruct`s; other options do not matter.
    """
    check_operands(query, key, value, dtypes=DTYPES, **options)
    rows = query.shape[1] * (query.shape[2] // key.shape[1])
    if rows > MOST_ROWS:
        raise NotImplementedError(
            f"query: at most {MOST_ROWS} rows per key/value head, got T · N / K = {rows}; "
            "`decode.reference` serves more"
        )
    if chunk is not None and (chunk < LANES or chunk % LANES):
        raise ValueError(f"chunk: expected a multiple of {LANES}, got {chunk}")


def _differentiable(kernel, specification, arrays) -> Any:
    """The kernel, with the derivative of its specification, of which there is no kernel."""
    call = jax.custom_jvp(kernel)
    call.defjvp(lambda primals, tangents: jax.jvp(specification, primals, tangents))
    return call(arrays)


def _run(
    query, key, value, query_positions, key_positions, normalizer, scale, new_key=None,
    new_value=None, slots=None, sink_query=None, num_sink_slots=0, num_sink_tokens=0, window=None,
    sinks=None, normalizer_params=None, logits_soft_cap=None, key_scale=None, value_scale=None,
    chunk=None, skip=None, interpret=False,
) -> Step:  # fmt: skip
    B, T, N, H = query.shape
    K, C, Hv = value.shape[1:]
    G = N // K

    def by_head(x):
        """[B, T, N, …] as rows t · G + g of each key/value head."""
        x = x.reshape(x.shape[0], T, K, G, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(x.shape[0], K, T * G, *x.shape[4:])

    numbers = dict(normalizer_params or {})
    if sinks is not None:
        numbers["sink"] = sinks
    heads = heads_of(K)
    rows = heads * -(-T * G // 8) * 8
    size = chunk or chunk_of(C, heads * (H + Hv) * key.dtype.itemsize, rows)
    ring = Ring(
        normalizer=normalizer,
        scale=scale,
        soft_cap=logits_soft_cap,
        window=window,
        sink_tokens=num_sink_tokens,
        sink_slots=num_sink_slots,
        tokens=T,
        slots=C,
        chunk=size,
        heads=heads,
        all_heads=K,
        flipped=frozenset(n for n, width in (("key", H), ("value", Hv)) if width % LANES),
        skips=-(-C // size) >= WORTH_SKIPPING if skip is None else skip,
        interpret=interpret,
    )

    def flip(name, x):
        """Narrow leaves have their slots in lanes, as XLA lays them out: no copy, and dense."""
        return x.swapaxes(2, 3) if name in ring.flipped else x

    operands: dict[str, Any] = {
        "clock": query_positions.astype(jnp.int32).ravel(),
        "query": by_head(query),
        "positions": key_positions.astype(jnp.int32),
        "key": flip("key", key),
        "value": flip("value", value),
    }
    if sink_query is not None and ring.sink_slots:
        operands["sink_query"] = by_head(sink_query.astype(query.dtype))
    for name, x in numbers.items():
        batch, width = (x.shape[0], T * N) if x.ndim == 3 else (1, N)
        operands[name] = x.astype(jnp.float32).reshape(batch, 1, width)
    if key_scale is not None:
        operands |= {"key_scale": key_scale, "value_scale": value_scale}
    if slots is not None and new_key is not None and new_value is not None:
        slots = slots.astype(jnp.int32)
        operands |= {"slot": slots, "new_key": new_key[:, 0], "new_value": new_value[:, 0]}
    if ring.skips:
        seen = visible(
            query_positions, key_positions, num_sink_tokens=num_sink_tokens,
            num_sink_slots=num_sink_slots, window=window,
        ).any(axis=2)  # fmt: skip
        if seen.shape[1] > 1:
            seen = seen.reshape(B, K // heads, heads, C).any(axis=2)
        operands["order"] = visits(seen, slots, ring)
    results = attend(ring, operands)
    out, lse = results["out"], results.get("lse")
    out = out.reshape(B, K, T, G, Hv).swapaxes(1, 2).reshape(B, T, N, Hv)
    if lse is not None:
        lse = lse.reshape(B, K // heads, T, G, heads).transpose(0, 2, 1, 4, 3).reshape(B, T, N)
    leaves = {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}
    return Step(out, lse, **leaves | {n: flip(n, results[n]) for n in leaves if n in results})


def heads_of(K: int) -> int:
    """Key/value heads of a grid step: as many as the tile of a block that lists them asks for."""
    return 8 if K % 8 == 0 else K


def chunk_of(C: int, bytes_per_slot: int, rows: int) -> int:
    """Slots of a grid step: about `STEP_BYTES` and at most `STEP_SCORES`, evenly divided.

    Args:
        bytes_per_slot: of keys and values, of all heads of a step; rows: of queries, of all heads.
    """
    most = min(STEP_BYTES // bytes_per_slot, STEP_SCORES // rows)
    chunks = -(-C // max(LANES, most // LANES * LANES))
    return -(-C // (chunks * LANES)) * LANES
