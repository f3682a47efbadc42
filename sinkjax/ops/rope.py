"""Rotary position embedding, exact at every int32 position.

A float32 product `position * frequency` has lost the angle by a few million tokens: at position
16,000,000 its error is near one radian, and an endless stream gets there. Here the angle is never
formed on the device. A position is cut into three groups of bits, each looks up the cosine and sine
of its part in a table made on the host, and the angle-addition formulas join them.
"""

import dataclasses
import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sinkjax import sharding

# 11 + 11 + 9 bits cover every non-negative int32 with tables of 2,048, 2,048 and 512 rows.
_LOW_BITS = 11
_ROWS = (2048, 2048, 512)

# To 60 digits: reducing an angle of up to 2**31 rad keeps 50 of them.
_TWO_PI = decimal.Decimal("6.28318530717958647692528676655900576839433879875021164194988918")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which rotation each pair of channels gets.

    Channel `i` and channel `i + H/2` form pair `i` (split halves, as Llama and its kin store their
    weights) and turn by `position * theta ** (-2i / H)` radians.

    Args:
      head_dim: `H`, even.
      theta: base of the frequencies; pair 0 turns one radian per token, the last pair about
        `1 / theta`.

    Raises:
      ValueError: `head_dim` is not a positive even number, or `theta` is not a positive number.
    """

    head_dim: int
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: expected a positive even number, got {self.head_dim}")
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise ValueError(f"theta: expected a positive finite number, got {self.theta}")


@functools.lru_cache(maxsize=64)
def _tables(rope: Rope, dtype: str) -> tuple[np.ndarray, ...]:
    """One `[rows, H]` table per group of bits: cosines of the H/2 pairs, then their sines."""
    with decimal.localcontext() as context:
        context.prec = 60
        theta, head_dim = decimal.Decimal(rope.theta), decimal.Decimal(rope.head_dim)
        frequencies = [theta ** (-2 * i / head_dim) for i in range(rope.head_dim // 2)]
        # Reduced before it becomes a float: float64(frequency) * 2**31 would be wrong by 2e-7 rad.
        steps = [
            np.array([float(f * 2 ** (_LOW_BITS * level) % _TWO_PI) for f in frequencies])
            for level in range(len(_ROWS))
        ]
    tables = []
    for rows, step in zip(_ROWS, steps, strict=True):
        angles = np.arange(rows, dtype=np.float64)[:, None] * step
        tables.append(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(dtype))
    return tuple(tables)


# Compiled as one call, so that a model of many layers carries the tables once.
@functools.partial(jax.jit, static_argnames=("rope", "dtype"))
def _cos_sin(positions: Array, *, rope: Rope, dtype: str) -> tuple[Array, Array]:
    index = jnp.abs(positions.astype(jnp.int32))
    factors = []
    for level, table in enumerate(_tables(rope, dtype)):
        row = (index >> (_LOW_BITS * level)) & (table.shape[0] - 1)
        entry = sharding.take_rows(jnp.asarray(table), row, mode="promise_in_bounds")
        factors.append(jnp.split(entry, 2, axis=-1))
    cos, sin = factors[0]
    for c, s in factors[1:]:
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return cos, sin * jnp.sign(positions).astype(dtype)[..., None]


def cos_sin(
    positions: Int[Array, "*batch"], rope: Rope, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*batch pairs"], Float[Array, "*batch pairs"]]:
    """Cosine and sine of every pair's angle at the given positions.

    `angle_i = position * theta ** (-2i / H)`, right to 1e-6 rad in float32 at every int32 position
    and to 1e-11 rad in float64.

    Why: keys that are stored rotated, and kernels that rotate what they load, want the factors
    without an array to apply them to.

    Args:
      positions: `[...]`, tokens. A negative one turns backwards, so padding (-1) stays finite.
      rope: the frequencies.
      dtype: of the results; bfloat16 and float16 are rounded from float32 factors.

    Returns:
      `(cos, sin)`, each `[..., H/2]`.

    Source: Su et al., "RoFormer", arXiv:2104.09864, equation 34.

    Example:
      >>> cos, sin = cos_sin(jnp.array([0, 16_000_000]), Rope(head_dim=2))
      >>> print(cos[:, 0], sin[:, 0])
      [1.        0.8461065] [0.        0.5330139]
    """
    table_dtype = jnp.promote_types(jax.dtypes.canonicalize_dtype(dtype), jnp.float32)
    cos, sin = _cos_sin(positions, rope=rope, dtype=table_dtype.name)
    return cos.astype(dtype), sin.astype(dtype)


def rotate(
    x: Float[Array, "*batch T N H"], positions: Int[Array, "*rows T"], rope: Rope
) -> Float[Array, "*batch T N H"]:
    """Queries or keys turned to their positions.

    `(x_i, x_{i+H/2}) -> (x_i cos a - x_{i+H/2} sin a, x_{i+H/2} cos a + x_i sin a)`.

    Why: the product of a query at `a` and a key at `b` then depends on `a - b` alone, and positions
    are data: a stream, a packed row and a cache of scattered tokens rotate alike.

    Args:
      x: `[..., T, N, H]`.
      positions: `[T]`, or with leading dimensions that broadcast to those of `x`; tokens.
      rope: the frequencies; its `head_dim` is `H`.

    Returns:
      `[..., T, N, H]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: `rope.head_dim` is not the head size of `x`, or `positions` do not fit `x`.

    Source: Su et al., "RoFormer", arXiv:2104.09864, equation 34, with split halves instead of
    interleaved pairs.
    """
    if x.shape[-1] != rope.head_dim:
        raise ValueError(f"rope: expected head_dim {x.shape[-1]} as in x, got {rope.head_dim}")
    rows = x.shape[:-2]
    given = positions.shape
    fits = 1 <= len(given) <= len(rows) and given[-1] == rows[-1]
    if not fits or any(g not in (1, r) for g, r in zip(given[::-1], rows[::-1], strict=False)):
        raise ValueError(f"positions: expected a shape that broadcasts to {rows}, got {given}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (f[..., None, :] for f in cos_sin(positions, rope, dtype))
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
