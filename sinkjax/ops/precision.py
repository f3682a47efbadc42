"""The precision that sums are made in."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def at_least_float32(x: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in float64 if it is that already.

    Why: bfloat16 keeps 8 bits, and a sum of a few hundred terms in it stands still.

    Args:
      x: any shape.

    Returns:
      The same shape; nothing is lost.
    """
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
