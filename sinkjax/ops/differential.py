r"""Differential attention: two maps of one pair of heads, the second subtracted from the first.

N query heads and K key/value heads make N/2 and K/2 pairs: head p with head p + N/2 (the authors'
code pairs neighbours; the split leaves query head n with key/value head n // (N/K), so that
projections, grouping and kernels stay as they are). The value of a pair is both its value heads side
by side. What cancels is what the two maps share, a sink among it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.ops.norms import rms_norm

LAMBDA_INIT = 0.8
"""The published $0.8 - 0.6 e^{-0.3 l}$ in the limit of deep layers. A constant, because layers that
are scanned are one program and know no depth."""

LAMBDA_STD = 0.1
"""Standard deviation of the four λ vectors at the start, as published."""


def widen_values(value: Float[Array, "..."], axis: int = -2) -> Float[Array, "..."]:
    """Both value heads of a pair side by side, for both of its key/value heads.

    Args:
        value: `[B, S, K, h]`, or with the heads on another axis: 1 for cache leaves.
        axis: of the heads.

    Returns:
        the same with 2h channels.

    Raises:
        ValueError: K is odd.
    """
    if value.shape[axis] % 2:
        raise ValueError(f"value: expected an even number of heads K, got {value.shape[axis]}")
    first, second = jnp.split(value, 2, axis=axis)
    pair = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([pair, pair], axis=axis)


def differential_lambda(
    query_1: Float[Array, " H"],
    key_1: Float[Array, " H"],
    query_2: Float[Array, " H"],
    key_2: Float[Array, " H"],
    lambda_init: float = LAMBDA_INIT,
) -> Float[Array, ""]:
    r"""$\lambda = e^{\lambda_{q1} \lambda_{k1}} - e^{\lambda_{q2} \lambda_{k2}} + \lambda_{init}$.

    Float32 at least, one number for all heads of the layer.

    Source: Ye et al. 2024, arXiv 2410.05258, eq. 2.
    """
    wide = jnp.promote_types(query_1.dtype, jnp.float32)

    def product(q, k):
        return jnp.exp(jnp.sum(q.astype(wide) * k.astype(wide)))

    return product(query_1, key_1) - product(query_2, key_2) + lambda_init


def combine(
    out: Float[Array, "B T N h2"],
    lam: Float[Array, ""],
    gain: Float[Array, " h2"],
    *,
    lambda_init: float = LAMBDA_INIT,
    epsilon: float = 1e-5,
) -> Float[Array, "B T N h"]:
    r"""$(1 - \lambda_{init})\, \mathrm{RMSNorm}(o_p - \lambda\, o_{p + N/2})$, laid back on N heads.

    Head p gets the first half of the channels of pair p, head p + N/2 the second, so that what
    follows (gates, output projection) sees N heads of the size it knows.

    Args:
        out: of attention on the values of `widen_values`, `[B, T, N, 2h]`.
        lam: of `differential_lambda`.
        gain: of the norm, `[2h]`, shared by all pairs; ones at the start.
        epsilon: of the norm; the authors' value.

    Returns:
        `[B, T, N, h]` in the dtype of `out`; float32 at least within.

    Raises:
        ValueError: an odd number of heads or channels.

    Source: Ye et al. 2024, arXiv 2410.05258, eqs. 1–3; microsoft/unilm, Diff-Transformer.
    """
    if out.shape[-1] % 2 or out.shape[-2] % 2:
        raise ValueError(f"out: expected [B, T, N, 2h] with an even N, got {out.shape}")
    wide = jnp.promote_types(out.dtype, jnp.float32)
    first, second = jnp.split(out.astype(wide), 2, axis=-2)
    difference = first - jnp.asarray(lam, wide) * second
    normed = rms_norm(difference, gain, epsilon) * (1 - lambda_init)
    return jnp.concatenate(jnp.split(normed, 2, axis=-1), axis=-2).astype(out.dtype)
