"""Decode attention on GPUs: each key and value is read once, by as many programs as keep a GPU busy.

`gpu_splits` holds the kernel, `running` the families of normalisers.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import int8
from sinkjax_kernels.decode.gpu_splits import Splits, attend
from sinkjax_kernels.decode.reference import Step, check_scales
from sinkjax_kernels.decode.refusals import check_operands
from sinkjax_kernels.flash.gpu_tiles import padded, power_of_2

DTYPES = "float32", "bfloat16", "float16"
MOST_ROWS = 64
PROGRAMS = 8 * 132
"""Eight for each multiprocessor of an H100: two or three at a time, and little left over at the end."""
SHORTEST_SPLIT, LONGEST_SPLIT = 128, 4096
"""Slots of a program; it looks at all their positions at once."""
TILE_BYTES = 32 * 2**10
"""Keys and values of a block: two stages of them fit the shared memory of every GPU since Volta."""


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
    split: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`decode.reference.decode_attention` on a GPU.

    Args:
        split: slots of a program, up to a multiple of the block; None chooses.
        interpret: run on any backend.

    Raises:
        NotImplementedError: the call is not one of these, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    check(
        query, key, value, query_positions=query_positions, key_positions=key_positions,
        sink_query=sink_query, bias=bias, sinks=sinks, normalizer=normalizer, key_scale=key_scale,
        value_scale=value_scale, interpret=interpret,
    )  # fmt: skip
    B, T, N, H = query.shape
    K, C, Hv = value.shape[1:]
    G = N // K
    R = T * G

    def rows(x):
        """[B, T, N, …] as rows t · G + g of each key/value head."""
        x = x.reshape(x.shape[0], T, K, G, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(x.shape[0], K, R, *x.shape[4:])

    def numbers(x):
        """[N] or [B, T, N], as rows."""
        x = x.astype(jnp.float32)
        return rows(jnp.broadcast_to(x, (x.shape[0] if x.ndim == 3 else 1, T, N)))

    block = block_of(H, Hv, key.dtype.itemsize)
    splits = Splits(
        normalizer=normalizer,
        scale=scale,
        soft_cap=logits_soft_cap,
        window=window,
        sink_tokens=num_sink_tokens,
        sink_slots=num_sink_slots,
        slots=C,
        size=-(-(split or split_of(B * K, C)) // block) * block,
        block=block,
        tokens=T,
        rows=min(MOST_ROWS, max(16, power_of_2(R))),
        interpret=interpret,
    )
    if sink_query is not None:
        sink_query = rows(sink_query.astype(query.dtype)) if num_sink_slots else None
    learned = {name: numbers(x)[0] for name, x in (normalizer_params or {}).items()}
    operands = {
        "clock": query_positions.astype(jnp.int32),
        "query": rows(query),
        "sink_query": sink_query,
        "positions": key_positions.astype(jnp.int32),
        "key": key,
        "value": value,
        "key_scale": key_scale,
        "value_scale": value_scale,
        "learned": learned or None,
    }
    out, lse = attend(splits, operands, None if sinks is None else numbers(sinks))
    out = out.reshape(B, K, T, G, Hv).swapaxes(1, 2).reshape(B, T, N, Hv).astype(query.dtype)
    if lse is not None:
        lse = lse.reshape(B, K, T, G).swapaxes(1, 2).reshape(B, T, N)
    return out, lse


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
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    **options: Any,
) -> Step:
    """`decode.reference.decode_step` on a GPU.

    XLA writes the token in place where the caller gives the leaves up (`jax.jit(…, donate_argnums=…)`).

    Args:
        options: of `decode_attention`.
    """
    B, _, K, H = new_key.shape
    if key.shape[:2] != (B, K) or key.shape[3] != H or value.shape[3] != new_value.shape[3]:
        raise ValueError(
            "new_key, new_value: expected the heads and sizes of the leaves "
            f"{list(key.shape)}, {list(value.shape)}, got {list(new_key.shape)}, "
            f"{list(new_value.shape)}"
        )
    check_scales(key, value, key_scale, value_scale)
    leaves = {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}
    new = {"key": new_key[:, 0], "value": new_value[:, 0]}
    if key_scale is not None:
        for name in ("key", "value"):
            new[name], new[f"{name}_scale"] = int8.quantize(new[name])
    at = jnp.where(slots < 0, key.shape[2], slots)  # a negative index would count from the end
    for name, x in new.items():
        where = leaves[name].at[jnp.arange(B), :, at]
        leaves[name] = where.set(x.astype(leaves[name].dtype), mode="drop", unique_indices=True)
    out, lse = decode_attention(
        query, leaves["key"], leaves["value"], query_positions=query_positions,
        key_positions=key_positions, key_scale=leaves["key_scale"],
        value_scale=leaves["value_scale"], **options,
    )  # fmt: skip
    return Step(out, lse, **leaves)


def check(query, key, value, **options: Any) -> None:
    """Raises for a call that `decode_attention` or `decode_step` with these options does not serve.

    Arrays may be traced or `jax.ShapeDtypeStruct`s; other options do not matter.
    """
    check_operands(query, key, value, dtypes=DTYPES, **options)


def block_of(H: int, Hv: int, itemsize: int) -> int:
    """Slots of a block, a power of two."""
    most = TILE_BYTES // ((padded(H) + padded(Hv)) * itemsize)
    return max(16, min(128, 1 << (most.bit_length() - 1)))


def split_of(heads: int, C: int) -> int:
    """Slots of a program: programs enough, and none so short that the merge counts."""
    parts = min(-(-PROGRAMS // heads), C // SHORTEST_SPLIT)
    return -(-C // max(1, parts, -(-C // LONGEST_SPLIT)))
