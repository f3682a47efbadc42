"""Gates: learned factors that let a head, a key or a value say nothing.

A head that has nothing to say needs somewhere to put its weight, because softmax sums to one: that
is the sink. A gate lets it say nothing, and models trained with one grow no sink.

Gates are named by what they multiply. Qiu et al. number the places: G1 after attention, G5 after
the output projection, and G2 to G4 value, key and query (in an order on which reports of the paper
disagree).
"""

import math

import jax
from jaxtyping import Array, Float

from sinkjax.ops.precision import at_least_float32

_WIDE_OPEN = {"sigmoid": 1.0, "twice_sigmoid": 2.0}


def gate_value(
    scores: Float[Array, "*shape"], activation: str = "sigmoid"
) -> Float[Array, "*shape"]:
    """What a gate multiplies by, or adds.

    `sigmoid(s)` for "sigmoid" and "additive", `2 sigmoid(s)` for "twice_sigmoid", `s sigmoid(s)`
    for "silu".

    Why: twice a sigmoid is 1 at a score of 0, so that a gate with a zero kernel changes nothing in
    a trained model. SiLU has no bound and additive gates cannot close: Qiu et al. found both worse.

    Args:
      scores: any shape; 0 is half open for a sigmoid.
      activation: one of the four.

    Returns:
      The shape of `scores`, float32 at least.

    Raises:
      ValueError: an activation of another name.

    Source: Qiu et al., arXiv:2505.06708, section 2.2; twice a sigmoid An et al., "Systematic
    Outliers in Large Language Models", arXiv:2502.06415 (context-aware scaling, released code).
    """
    scores = at_least_float32(scores)
    opened = jax.nn.sigmoid(scores)
    if activation in ("sigmoid", "additive"):
        return opened
    if activation == "twice_sigmoid":
        return 2 * opened
    if activation == "silu":
        return scores * opened
    raise ValueError(
        f"activation: expected one of sigmoid, twice_sigmoid, silu, additive; got {activation!r}"
    )


def gate_score(value: float, activation: str = "sigmoid") -> float:
    """The score at which a gate lets the fraction `value` through: the inverse of `gate_value`.

    `log(value / (1 - value))`, for "twice_sigmoid" that of `value / 2`.

    Why: as a bias it sets how open a gate starts, about .25 for one trained from scratch, nearly 1
    for one added to a trained model. The gradient of a gate open at .99995 is 5e-5 of its scores':
    it hardly learns; .98 is a compromise.

    Args:
      value: above 0 and below 1, or 2 for "twice_sigmoid".
      activation: "sigmoid" or "twice_sigmoid".

    Returns:
      The score.

    Raises:
      ValueError: `value` is outside its range, or the activation has no open fraction.

    Source: Bondarenko et al., arXiv:2306.12929 (pi_init).

    Example:
      >>> gate_score(0.5), round(gate_score(0.25), 4), gate_score(1.0, "twice_sigmoid")
      (0.0, -1.0986, 0.0)
    """
    if activation not in _WIDE_OPEN:
        raise ValueError(
            "activation: expected sigmoid or twice_sigmoid, which have an open fraction, "
            f"got {activation!r}"
        )
    if not 0 < value < _WIDE_OPEN[activation]:
        raise ValueError(
            f"value: expected above 0 and below {_WIDE_OPEN[activation]:g} with {activation}, "
            f"got {value}"
        )
    fraction = value / _WIDE_OPEN[activation]
    return math.log(fraction) - math.log1p(-fraction)


def apply_gate(
    subject: Float[Array, "..."],
    scores: Float[Array, "..."],
    activation: str = "sigmoid",
    *,
    divisor: float = 1.0,
) -> Float[Array, "..."]:
    """Anything through a gate.

    `subject * gate_value(scores) / divisor`; "additive" adds instead of multiplying.

    Why: the one place where every gate of the library is computed.

    Args:
      subject: any shape.
      scores: of a shape that broadcasts to that of `subject`.
      activation: as in `gate_value`.
      divisor: the open fraction at the start, so that the gated layer starts as it was without.

    Returns:
      The shape and dtype of `subject`; the arithmetic is float32 at least, rounded once.

    Raises:
      ValueError: `scores` does not broadcast, or an activation of another name.

    Source: Qiu et al., arXiv:2505.06708, equation 5; the divisor Bondarenko et al.,
    arXiv:2306.12929, appendix B (fine-tuning).
    """
    dims = zip(scores.shape[::-1], subject.shape[::-1], strict=False)
    if scores.ndim > subject.ndim or any(a not in (1, b) for a, b in dims):
        raise ValueError(
            f"scores: expected a shape that broadcasts to {subject.shape}, got {scores.shape}"
        )
    value, wide = gate_value(scores, activation), at_least_float32(subject)
    gated = wide + value if activation == "additive" else wide * value
    return (gated if divisor == 1 else gated / divisor).astype(subject.dtype)


def headwise_gate(
    out: Float[Array, "B T N H"], scores: Float[Array, "B T N"], activation: str = "sigmoid"
) -> Float[Array, "B T N H"]:
    """Each head's output times one gate per query.

    `out * sigmoid(scores)`, the same factor for all `H` channels.

    Why: it removes sinks for `D * N` parameters a layer, next to nothing.

    Args:
      out: `[B, T, N, H]`, attention output.
      scores: `[B, T, N]`, a projection of the layer's input; 0 halves, large opens.
      activation: as in `gate_value`.

    Returns:
      `[B, T, N, H]` in the dtype of `out`.

    Raises:
      ValueError: `scores` is not `[B, T, N]`, or an activation of another name.

    Source: Qiu et al., "Gated Attention for Large Language Models", arXiv:2505.06708, section 2.2
    (position G1, head-wise).

    Example:
      >>> import jax.numpy as jnp
      >>> headwise_gate(jnp.ones((1, 1, 2, 1)), jnp.array([[[0.0, 100.0]]]))[0, 0, :, 0].tolist()
      [0.5, 1.0]
    """
    if scores.shape != out.shape[:-1]:
        raise ValueError(f"scores: expected shape {out.shape[:-1]}, got {scores.shape}")
    return apply_gate(out, scores[..., None], activation)


def elementwise_gate(
    out: Float[Array, "B T N H"], scores: Float[Array, "B T N H"], activation: str = "sigmoid"
) -> Float[Array, "B T N H"]:
    """Each channel of each head's output times its own gate.

    `out * sigmoid(scores)`.

    Why: the strongest of the published positions and shapes of gates, for `D * N * H` parameters
    a layer. On queries, keys and values it is the same function.

    Args:
      out: `[B, T, N, H]`, attention output.
      scores: `[B, T, N, H]`, a projection of the layer's input; 0 halves, large opens.
      activation: as in `gate_value`.

    Returns:
      `[B, T, N, H]` in the dtype of `out`.

    Raises:
      ValueError: `scores` is not `[B, T, N, H]`, or an activation of another name.

    Source: Qiu et al., "Gated Attention for Large Language Models", arXiv:2505.06708, section 2.2
    (position G1, element-wise).
    """
    if scores.shape != out.shape:
        raise ValueError(f"scores: expected shape {out.shape}, got {scores.shape}")
    return apply_gate(out, scores, activation)


def shared_gate(
    out: Float[Array, "B T N H"], scores: Float[Array, "B T H"], activation: str = "sigmoid"
) -> Float[Array, "B T N H"]:
    """Each channel of the attention output times a gate that all heads share.

    `out * sigmoid(scores)`, the same `H` factors for all `N` heads.

    Why: a control. It lowers massive activations and leaves the sink: what removes the sink is
    that a head closes alone.

    Args:
      out: `[B, T, N, H]`, attention output.
      scores: `[B, T, H]`, a projection of the layer's input.
      activation: as in `gate_value`.

    Returns:
      `[B, T, N, H]` in the dtype of `out`.

    Raises:
      ValueError: `scores` is not `[B, T, H]`, or an activation of another name.

    Source: Qiu et al., arXiv:2505.06708, section 2.2 (position G1, head-shared).
    """
    expected = (*out.shape[:2], out.shape[-1])
    if scores.shape != expected:
        raise ValueError(f"scores: expected shape {expected}, got {scores.shape}")
    return apply_gate(out, scores[:, :, None], activation)
