"""What attention does to its keys, as small arrays: the specification, from dense weights."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash import reference as flash
from sinkjax_kernels.masks import Visibility

TINY = 1e-8
"""Added to a row's mass before dividing by it (Gu et al. 2024, released code)."""


class AttentionStatistics(NamedTuple):
    """Reductions of the attention weights w; float32 at least, O(T + S) per head.

    Attributes:
        key_mass: sum over queries of w on each key; of a signed normaliser with its sign.
        key_mass_normalized: the same after dividing each row by its sum of |w|: the proxy score of
            Gu et al. 2024 for normalisers whose rows do not sum to one.
        key_count: number of queries that see the key; key_mass / key_count is the importance α.
        row_mass: sum of w over the keys of a row.
        sink_mass: weight on the sink logit (or on the constant of softmax1 and softmax_n); else 0.
        entropy: −Σ p ln p in nats, p the row-normalised |w|; 0 for a row without weight.
        max_logit: largest visible logit; −inf for a row that sees nothing.
    """

    key_mass: Float[Array, "B N S"]
    key_mass_normalized: Float[Array, "B N S"]
    key_count: Float[Array, "B N S"]
    row_mass: Float[Array, "B N T"]
    sink_mass: Float[Array, "B N T"]
    entropy: Float[Array, "B N T"]
    max_logit: Float[Array, "B N T"]


def reduce_weights(
    weights: Float[Array, "*heads T S"],
    where: Bool[Array, "*heads T S"],
    logits: Float[Array, "*heads T S"],
    sink_mass: Float[Array, "*heads T"],
) -> AttentionStatistics:
    """The statistics of some rows; those over queries add up over blocks of rows."""
    size = jnp.abs(weights)
    shares = size / (size.sum(-1, keepdims=True) + TINY)
    # p ln p → 0 as p → 0; the inner `where` keeps the logarithm finite there.
    surprise = shares * jnp.log(jnp.where(shares > 0, shares, 1))
    return AttentionStatistics(
        key_mass=weights.sum(-2),
        key_mass_normalized=shares.sum(-2),
        key_count=where.sum(-2).astype(weights.dtype),
        row_mass=weights.sum(-1),
        sink_mass=sink_mass,
        entropy=-surprise.sum(-1),
        max_logit=jnp.max(logits, axis=-1, where=where, initial=-jnp.inf),
    )


def sink_share(normalizer, lse, sinks, row_mass):
    """Weight that went to the sink term: exp(s − LSE), with s = 0 for softmax1."""
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((), constant, row_mass.dtype)
    if sinks is None:
        return jnp.zeros_like(row_mass)
    return jnp.broadcast_to(jnp.exp(sinks - lse), row_mass.shape)


def attention_statistics(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None,
    lse: Float[Array, "B T N"] | None = None,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params=None,
) -> AttentionStatistics:
    """The statistics of `flash.reference.attention` with the same arguments; dense.

    `lse`, when the caller has it from the forward pass, is used instead of computing it anew.
    """
    visibility, options = flash.rows_for(
        normalizer, visibility, normalizer_params, query.shape[2] // key.shape[2]
    )
    logits, where = flash.logits_and_mask(
        query, key, bias, mask, visibility, scale=scale, logits_soft_cap=logits_soft_cap
    )
    sinks = flash.sinks_by_row(sinks, logits)
    if lse is not None and normalizer.has_log_sum_exp:
        lse = lse.swapaxes(1, 2)
        safe = jnp.where(lse == -jnp.inf, 0, lse)
        exponents = normalizers.exponent(normalizer, logits)
        weights = jnp.where(where, jnp.exp(exponents - safe[..., None]), 0)
    else:
        weights, lse = normalizers.weights(normalizer, logits, where, sinks=sinks, **options)
    share = sink_share(normalizer, lse, sinks, weights[..., 0])
    return reduce_weights(weights, where, logits, share)
