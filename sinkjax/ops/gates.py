"""Gates on the output of attention, before the output projection.

A head that has nothing to say needs somewhere to put its weight, because softmax sums to one: that
is the sink. A gate lets it say nothing, and models trained with one grow no sink.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def headwise_gate(
    out: Float[Array, "B T N H"], scores: Float[Array, "B T N"]
) -> Float[Array, "B T N H"]:
    """Each head's output times one gate per query.

    `out * sigmoid(scores)`, the same factor for all `H` channels.

    Why: it removes sinks for `D * N` parameters a layer, next to nothing.

    Args:
      out: `[B, T, N, H]`, attention output.
      scores: `[B, T, N]`, a projection of the layer's input; 0 halves, large opens.

    Returns:
      `[B, T, N, H]` in the dtype of `out`.

    Raises:
      ValueError: `scores` is not `[B, T, N]`.

    Source: Qiu et al., "Gated Attention for Large Language Models", arXiv:2505.06708, section 2.2
    (position G1, head-wise).

    Example:
      >>> headwise_gate(jnp.ones((1, 1, 2, 1)), jnp.array([[[0.0, 100.0]]]))[0, 0, :, 0].tolist()
      [0.5, 1.0]
    """
    if scores.shape != out.shape[:-1]:
        raise ValueError(f"scores: expected shape {out.shape[:-1]}, got {scores.shape}")
    return _gated(out, scores[..., None])


def elementwise_gate(
    out: Float[Array, "B T N H"], scores: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Each channel of each head's output times its own gate.

    `out * sigmoid(scores)`.

    Why: the strongest of the published positions and shapes of gates, for `D * N * H` parameters
    a layer.

    Args:
      out: `[B, T, N, H]`, attention output.
      scores: `[B, T, N, H]`, a projection of the layer's input; 0 halves, large opens.

    Returns:
      `[B, T, N, H]` in the dtype of `out`.

    Raises:
      ValueError: `scores` is not `[B, T, N, H]`.

    Source: Qiu et al., "Gated Attention for Large Language Models", arXiv:2505.06708, section 2.2
    (position G1, element-wise).
    """
    if scores.shape != out.shape:
        raise ValueError(f"scores: expected shape {out.shape}, got {scores.shape}")
    return _gated(out, scores)


def _gated(out: Array, scores: Array) -> Array:
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    return (out.astype(dtype) * jax.nn.sigmoid(scores.astype(dtype))).astype(out.dtype)
