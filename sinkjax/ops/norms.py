"""Normalisation by the root mean square, and what has been put in its place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.ops.precision import at_least_float32


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
    _expect("scale", scale, x.shape[-1:])
    return (_unit(x, epsilon) * at_least_float32(scale)).astype(x.dtype)


def single_scale_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, ""], epsilon: float = 1e-6
) -> Float[Array, "*batch D"]:
    """`rms_norm` with one scale for all channels (SSNorm).

    `scale * x / sqrt(mean(x ** 2) + epsilon)`, `scale` a number.

    Why: a gain per channel gives every channel an axis of its own, along which outliers grow.
    With one gain the norm commutes with rotations; together with Muon it keeps the kurtosis of a
    1.4B model at 67, against 1,575 with Muon alone.

    Args:
      x: `[..., D]`.
      scale: `[]`; 1 at initialisation. As `gain * x / |x|` the gain starts at `sqrt(D)`.
      epsilon: added to the mean square, in units of `x ** 2`.

    Returns:
      `[..., D]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: `scale` is not a number.

    Source: Park et al., "Outlier-Safe Pre-Training", arXiv:2506.19697; the start is that of the
    released code, `RMSNorm(feature_axes=())`.
    """
    _expect("scale", scale, ())
    return (_unit(x, epsilon) * at_least_float32(scale)).astype(x.dtype)


def pre_affine_norm(
    x: Float[Array, "*batch D"],
    pre_scale: Float[Array, " D"],
    scale: Float[Array, " D"],
    epsilon: float = 1e-6,
) -> Float[Array, "*batch D"]:
    """`rms_norm` with a learned scale before it too.

    `rms_norm(pre_scale * x, scale)`.

    Why: models keep a few residual channels huge (residual sinks) because dividing by their size
    scales all others down. Here a learned constant can be that size, and the stream stays small.

    Args:
      x: `[..., D]`.
      pre_scale: `[D]`; ones at initialisation.
      scale: `[D]`; ones at initialisation.
      epsilon: added to the mean square, in units of `(pre_scale * x) ** 2`.

    Returns:
      `[..., D]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: a scale is not `[D]`.

    Source: Qiu et al., "A Unified View of Attention and Residual Sinks", arXiv:2601.22966.
    """
    _expect("pre_scale", pre_scale, x.shape[-1:])
    _expect("scale", scale, x.shape[-1:])
    scaled = at_least_float32(x) * at_least_float32(pre_scale)
    return (_unit(scaled, epsilon) * at_least_float32(scale)).astype(x.dtype)


def gated_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"],
    down: Float[Array, "D R"],
    up: Float[Array, "R D"],
    epsilon: float = 1e-6,
) -> Float[Array, "*batch D"]:
    """`rms_norm` behind a low-rank gate of itself (GatedNorm).

    `y * sigmoid(silu(y @ down) @ up)`, `y = rms_norm(x, scale)`.

    Why: the gate scales channels down for each token, which a norm can do only by letting one
    channel grow. It starts at one half: the branches behind it start with half the input.

    Args:
      x: `[..., D]`.
      scale: `[D]`; ones at initialisation.
      down: `[D, R]`, `R` is 16 in the source.
      up: `[R, D]`.
      epsilon: added to the mean square, in units of `x ** 2`.

    Returns:
      `[..., D]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: an array has another shape.

    Source: Qiu et al., "A Unified View of Attention and Residual Sinks", arXiv:2601.22966.
    """
    _expect("scale", scale, x.shape[-1:])
    _expect("down", down, (x.shape[-1], down.shape[-1]))
    _expect("up", up, (down.shape[-1], x.shape[-1]))
    y = _unit(x, epsilon) * at_least_float32(scale)
    inside = jax.nn.silu(jnp.einsum("...D,DR->...R", y, at_least_float32(down)))
    gate = jax.nn.sigmoid(jnp.einsum("...R,RD->...D", inside, at_least_float32(up)))
    return (y * gate).astype(x.dtype)


def dynamic_tanh(
    x: Float[Array, "*batch D"],
    alpha: Float[Array, ""],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
) -> Float[Array, "*batch D"]:
    """A squashing function in the place of a norm (DyT).

    `scale * tanh(alpha * x) + bias`.

    Why: no token is divided by its own size, so no channel gains by growing. Models with it have
    smaller massive activations and stronger sinks.

    Args:
      x: `[..., D]`.
      alpha: `[]`; 0.5 at initialisation.
      scale: `[D]`; ones at initialisation.
      bias: `[D]`; zeros at initialisation.

    Returns:
      `[..., D]` in the dtype of `x`; the arithmetic is float32 at least.

    Raises:
      ValueError: an array has another shape.

    Source: Zhu et al., "Transformers without Normalization", arXiv:2503.10622, equation 2.
    """
    _expect("alpha", alpha, ())
    _expect("scale", scale, x.shape[-1:])
    _expect("bias", bias, x.shape[-1:])
    squashed = jnp.tanh(at_least_float32(alpha) * at_least_float32(x))
    return (squashed * at_least_float32(scale) + at_least_float32(bias)).astype(x.dtype)


def _unit(x: Array, epsilon: float) -> Array:
    wide = at_least_float32(x)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)


def _expect(name: str, value: Array, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {value.shape}")
