"""Numbers of 2, 4 or 8 bits with a scale per group, really packed into bytes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from sinkjax.ops.precision import at_least_float32

BITS = (2, 4, 8)
"""Widths that fill a byte."""


class Quantized(NamedTuple):
    """A tensor of few bits: x ≈ zero + scale · code.

    Args:
        codes: uint8, packed along the last axis, `pack`.
        scale: of each group, 1 in the place of the group's axis; what is stored, so rounded to its
            dtype already.
        zero: the same of its smallest number; None where it is symmetric about 0.
    """

    # `Any`: tree transformations put all sorts of things in the place of arrays.
    codes: Any
    scale: Any
    zero: Any = None


def quantize(
    x: Float[Array, "*shape"],
    *,
    bits: int,
    axis: int,
    symmetric: bool = False,
    where: Bool[Array, "..."] | None = None,
    dtype: DTypeLike | None = None,
) -> Quantized:
    r"""$q = \mathrm{round}((x - z)/s)$ with $z = \min x$, $s = (\max x - z)/(2^b - 1)$ of a group.

    Symmetric: $s = \max |x| / (2^{b-1} - 1)$ and $q = \mathrm{round}(x / s) + 2^{b-1} - 1$, which needs
    no zero. A group is everything along `axis`: reshape to have several.

    Zero and scale are rounded outwards to the dtype that they are stored in, and x is measured
    against what is stored. So nothing is clipped, and no x is further than s/2 from
    `dequantize`, whatever the dtype.

    Args:
        x: finite.
        bits: 2, 4 or 8.
        axis: along which numbers share a scale; for keys tokens, for values channels.
        where: numbers that count, broadcast to x; the others get code 0. None: all.
        dtype: of scale and zero; None is that of x.

    Returns:
        codes with the last axis of ⌈H · bits / 8⌉ bytes; ties to even. A group of one number s = 1.

    Raises:
        ValueError: another number of bits.

    Source: Liu et al. 2024 (KIVI), arXiv 2402.02750, §3.1, with keys per channel and values per
    token as in its §3.2; symmetric as `sinkjax_kernels.decode.int8`.
    """
    _check(bits)
    dtype = x.dtype if dtype is None else dtype
    x = at_least_float32(x)
    where = jnp.ones((), bool) if where is None else where
    where = jnp.broadcast_to(where, x.shape)
    if symmetric:
        half = 2 ** (bits - 1) - 1
        top = jnp.where(where, jnp.abs(x), 0).max(axis, keepdims=True)
        zero, levels, centre = None, half, half
    else:
        low = jnp.where(where, x, jnp.inf).min(axis, keepdims=True)
        high = jnp.where(where, x, -jnp.inf).max(axis, keepdims=True)
        some = where.any(axis, keepdims=True)
        zero = -_round_up(jnp.where(some, -low, 0), dtype)
        levels, centre = 2**bits - 1, 0
        x = x - zero.astype(x.dtype)
        top = jnp.where(some, high, 0) - zero.astype(x.dtype)
    scale = _round_up(top / levels, dtype)
    scale = jnp.where(scale > 0, scale, 1)
    codes = jnp.clip(jnp.round(x / scale.astype(x.dtype)) + centre, 0, centre + levels)
    codes = jnp.where(where, codes, 0)
    return Quantized(pack(codes.astype(jnp.uint8), bits), scale, zero)


def dequantize(
    x: Quantized, *, bits: int, size: int, dtype: DTypeLike
) -> Float[Array, "*slots size"]:
    """zero + scale · code, computed in float32 at least.

    Args:
        x: of `quantize` with the same bits.
        size: numbers along the last axis; bytes are whole.
        dtype: of the result.
    """
    _check(bits)
    scale = at_least_float32(x.scale)
    codes = unpack(x.codes, bits, size).astype(scale.dtype)
    if x.zero is None:
        return ((codes - (2 ** (bits - 1) - 1)) * scale).astype(dtype)
    return (at_least_float32(x.zero) + codes * scale).astype(dtype)


def pack(codes: UInt8[Array, "*slots size"], bits: int) -> UInt8[Array, "*slots bytes"]:
    """Several codes to a byte, the first of them in the low bits.

    Byte i of n holds the codes i, i + n, i + 2n, …: whoever unpacks lays whole rows side by side
    and does not interleave.
    """
    per = 8 // bits
    size = packed_size(codes.shape[-1], bits)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, size * per - codes.shape[-1])]
    rows = jnp.pad(codes, padding).reshape(*codes.shape[:-1], per, size)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    return jnp.bitwise_or.reduce(rows << shifts, axis=-2)


def unpack(
    packed: UInt8[Array, "*slots bytes"], bits: int, size: int
) -> UInt8[Array, "*slots size"]:
    """The codes that `pack` was given; `size` of them along the last axis."""
    low = jnp.uint8(2**bits - 1)
    rows = [(packed >> jnp.uint8(shift)) & low for shift in range(0, 8, bits)]
    return jnp.concatenate(rows, axis=-1)[..., :size]


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes take."""
    return -(-size * bits // 8)


def _round_up(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """The smallest number of `dtype` that is not below x."""
    nearest = x.astype(dtype)
    above = jnp.nextafter(nearest, jnp.asarray(jnp.inf, nearest.dtype))
    return jnp.where(nearest.astype(x.dtype) < x, above, nearest)


def _check(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits!r}")
