"""Normalisation by the root mean square."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], epsilon: float = 1e-6
) -> Float[Array, "*batch D"]:
    """`x` at unit root mean square over its last dimension, times a learned scale.

    `scale * x / sqrt(mean(x ** 2) + epsilon)`.

    Why: it keeps a deep residual stream in range without a mean or a bias. Over the head dimension
    of queries and keys (QK-norm) it bounds the attention logits by
    `scale_q * scale_k * sqrt(H)`, and with them how sharp a sink can become.

    Args:
      x: `[..., D]`.
      scale: `[D]`; ones at initialisation.
      epsilon: added to the mean square, in units of `x ** 2`.

    Returns:
      `[..., D]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: `scale` is not `[D]`.

    Source: Zhang and Sennrich, arXiv:1910.07467, equation 4; for queries and keys Henry et al.,
    arXiv:2010.04245, and Dehghani et al., arXiv:2302.05442, section 2.

    Example:
      >>> rms_norm(jnp.array([3.0, -4.0]), jnp.array([1.0, 2.0]), epsilon=0.0).round(3).tolist()
      [0.849..., -2.263...]
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale: expected shape {x.shape[-1:]}, got {scale.shape}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(dtype)).astype(x.dtype)
