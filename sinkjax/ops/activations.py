"""Gated activations."""

import jax
from jaxtyping import Array, Float


def swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """The gated activation of most current decoders.

    `silu(gate) * up`, `silu(x) = x * sigmoid(x)`.

    Why: at equal parameters it trains to a lower loss than ReLU or GELU. It is also where massive
    activations are born: two large factors in one channel multiply.

    Args:
      gate: `[..., F]`, the projection that passes the nonlinearity.
      up: `[..., F]`, the projection it multiplies.

    Returns:
      `[..., F]`, in the dtype of the inputs.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, equation 6.

    Example:
      >>> import jax.numpy as jnp
      >>> swiglu(jnp.array([0.0, 100.0]), jnp.array([3.0, 2.0])).tolist()
      [0.0, 200.0]
    """
    return jax.nn.silu(gate) * up
