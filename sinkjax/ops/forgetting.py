r"""Forgetting attention: a learned gate per token and head makes what came before it fade.

The logit of key j for query i is $x_{ij} + F_i - F_j$ with $F = \mathrm{cumsum}(\log f)$, the sum of
the log gates from j + 1 to i. That is a `[T, S]` array, but an exp-sum does not notice a constant per
row: $-F_j$ on the keys says the same, if whatever else is in the denominator moves by $-F_i$.

Packed rows need no special case: a pair of one segment has nothing between it but tokens of that
segment, so the other segments' gates cancel in $F_i - F_j$.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def log_forget(
    scores: Float[Array, "B T N"], where: Bool[Array, "#B T"] | None = None
) -> Float[Array, "B T N"]:
    r"""$\log f = \log \sigma(\mathrm{scores})$, float32 at least; 0 (nothing fades) at padding.

    Args:
        scores: a projection of the layer's input, one number per token and query head.
        where: tokens that are no padding; None: all.

    Source: Lin et al. 2025 (Forgetting Transformer), arXiv 2503.02130.
    """
    log_gates = jax.nn.log_sigmoid(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
    return log_gates if where is None else jnp.where(where[..., None], log_gates, 0)


def cumulative_decay(log_gates: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    r"""$F_t = \sum_{l \le t} \log f_l$ along the row, float32 at least.

    Its rounding, the last bit of F at the end of the row, is the error of the logits.
    """
    dtype = jnp.promote_types(log_gates.dtype, jnp.float32)
    return jnp.cumsum(log_gates, axis=1, dtype=dtype)


def decay_bias(
    decay: Float[Array, "B T N"],
) -> tuple[Float[Array, "B N 1 T"], Float[Array, "B T N"]]:
    r"""$F_i - F_j$ for causal attention with an exp-sum, without an array of `[T, S]`.

    Args:
        decay: F, of `cumulative_decay` or `alibi_decay`; decays may be added up.

    Returns:
        the bias $-F_j$ for the attention call, and the shift $-F_i$ for `join_sinks`. A log-sum-exp
        that the call returns has moved by the shift too. The output is exactly that of the
        logits $x_{ij} + F_i - F_j$, up to rounding.

    Source: Lin et al. 2025, arXiv 2503.02130, and the parallel form of flash-linear-attention.
    """
    return -decay.swapaxes(1, 2)[:, :, None, :], -decay


def dense_decay_bias(decay: Float[Array, "B T N"]) -> Float[Array, "B N T T"]:
    r"""$F_i - F_j$ itself, for kernels that notice a constant per row; only for causal attention."""
    rows = decay.swapaxes(1, 2)
    return rows[..., :, None] - rows[..., None, :]
