"""Keys and values as int8 with one float32 scale per slot and head: x = scale · int8."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Num

LARGEST = 127


def quantize(
    x: Float[Array, "*slots H"],
) -> tuple[Int8[Array, "*slots H"], Float[Array, "*slots"]]:
    r"""$s = \max_h |x_h| / 127$ (1 where that is 0) and $x / s$ rounded to nearest, ties to even.

    Symmetric, so that a product with int8 needs one multiplication per slot and no offset. x must be
    finite.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1, keepdims=True) * (1 / LARGEST)
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(x / scale).astype(jnp.int8), scale[..., 0]


def dequantize(
    x: Num[Array, "*slots H"], scale: Float[Array, "*slots"] | None
) -> Num[Array, "*slots H"]:
    """scale · x in float32; without a scale x as it is."""
    return x if scale is None else x.astype(jnp.float32) * scale[..., None]
