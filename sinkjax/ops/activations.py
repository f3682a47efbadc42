"""Gated activations."""

import jax
import jax.numpy as jnp
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


def clamped_swiglu(
    gate: Float[Array, "*batch F"],
    up: Float[Array, "*batch F"],
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Float[Array, "*batch F"]:
    """The gated activation of gpt-oss.

    `g * sigmoid(alpha * g) * (u + 1)` with `g = min(gate, limit)`, `u = clip(up, -limit, limit)`.

    Why: what comes out is below 56, so no channel makes a massive activation by itself; with `up`
    at 0 the layer passes the gate on.

    Args:
      gate: `[..., F]`, clamped from above only.
      up: `[..., F]`.
      alpha: 1.702 makes `x * sigmoid(alpha * x)` nearly GELU.
      limit: of both.

    Returns:
      `[..., F]`, in the dtype of the inputs.

    Source: gpt-oss model card, arXiv:2508.10925, section 2, and the constants of its published code.

    Example:
      >>> import jax.numpy as jnp
      >>> clamped_swiglu(jnp.array([0.0, 100.0]), jnp.array([3.0, -1.0])).tolist()
      [0.0, 0.0]
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
