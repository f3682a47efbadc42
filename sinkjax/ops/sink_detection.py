"""Which tokens of a text are sinks: three criteria of the field, as scores per token.

A sink is not always among the first tokens: Llama-2-7B has one at the first delimiter too, token 14
in a much quoted text. Every function is pure, scores `[..., T]` come with a threshold of their own,
and a token is a sink where its score is above it. What the papers do not say is chosen here and
marked so.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.statistics import importance

MASS_EPSILON = 0.1
"""Of `mass_scores`. Chosen: a third of the 0.3 that Gu et al. ask of one head, since the mean is over
all heads, those of the first layers included, which have no sink."""

LEAST_MASS = 4.0
"""Chosen: weight that a key must have been given in all, where the average key is given 1."""

OUTLIER_RATIO = 64.0
"""Of `outlier_scores` and `channel_scores`: η of PrefixQuant (Chen et al. 2024, arXiv 2410.05265)."""

STABLE_SHARE = 0.5
"""Chosen: layers in which a channel must be an outlier. In Llama-2-7B it is 28 of 32."""


def mass_scores(
    key_mass: Float[Array, "*layers B N S"],
    key_count: Num[Array, "*layers B N S"],
    least_mass: float = LEAST_MASS,
) -> Float[Array, "B S"]:
    r"""Attention that each token gets from the queries that see it, a mean over layers and heads.

    $\frac{1}{LN} \sum_{l,n} \alpha_k^{l,n}$ with $\alpha_k = \sum_{i \text{ sees } k} A_{ik} / \#\{i\}$

    A token near the end is seen by a few queries, its own neighbours, and they look at it without its
    being a sink: where the mean of $\sum_i A_{ik}$ is below `least_mass` the score is 0.

    Args:
        key_mass, key_count: of `Output.statistics`, for whole texts. least_mass: see above.
    Returns:
        Scores, in [0, 1] for weights that sum to one; a sink is above `MASS_EPSILON`.
    Source: importance after Gu et al. 2410.10781 eq. 6; the mean over heads instead of their rate.
    """
    heads = tuple(
        i for i in range(key_mass.ndim) if i not in (key_mass.ndim - 3, key_mass.ndim - 1)
    )
    total = jnp.mean(key_mass, axis=heads)
    score = jnp.mean(importance(key_mass, key_count), axis=heads)
    return jnp.where(total >= least_mass, score, 0.0)


def outlier_scores(
    hidden: Float[Array, "*lead T D"], where: Bool[Array, "..."] | None = None
) -> Float[Array, "*lead T"]:
    r"""How far the largest entry of a token stands out from that of the other tokens.

    $s_t = m_t / \mathrm{median}_t\, m_t$ with $m_t = \max_d |x_{td}|$

    Args:
        hidden: what goes into the down projection (the paper), or the residual stream (their code
            has both), of one text per leading index.
        where: True for real tokens, broadcastable to [*lead, T].
    Returns:
        Ratios, 0 for padding; a sink is above `OUTLIER_RATIO` in some layer.
    Source: PrefixQuant, Chen et al. 2410.05265, `utils/stat_utils.py` (ratio of the maxima).
    """
    size = jnp.max(jnp.abs(at_least_float32(hidden)), axis=-1)
    where = jnp.broadcast_to(True if where is None else where, size.shape)
    median = jnp.nanmedian(jnp.where(where, size, jnp.nan), axis=-1, keepdims=True)
    return jnp.where(where, _over(size, jnp.nan_to_num(median)), 0.0)


def channel_peaks(
    hidden: Float[Array, "*lead B T D"], where: Bool[Array, "B T"] | None = None
) -> Float[Array, "*lead D"]:
    r"""How far a few tokens stand out in each channel.

    $\max_{b,t} |h_{btd}| / \max(\mathrm{median}_{b,t} |h_{btd}|, \mathrm{median}_{b,t,d} |h_{btd}|)$

    Small for a channel that is large in every token: that one carries no sink.

    Args:
        hidden: residual stream after a layer, per leading index.
        where: True for real tokens.
    Returns:
        Ratio per channel.
    Source: as `channel_scores`.
    """
    size = _magnitude(hidden, where)
    top = jnp.nanmax(size, axis=(-3, -2))
    return _over(top, _usual(size)[..., 0, 0, :])


def stable_channels(
    peaks: Float[Array, "L D"], ratio: float = OUTLIER_RATIO, share: float = STABLE_SHARE
) -> Bool[Array, " D"]:
    """Channels that are outliers in at least this share of the layers: fixed by the model's weights.

    Args:
        peaks: of `channel_peaks`, the largest over some texts. ratio, share: the two bounds.
    """
    needed = max(1, math.ceil(share * peaks.shape[0]))
    return jnp.sum(peaks > ratio, axis=0) >= needed


def emergence_layer(
    peaks: Float[Array, "L D"], channels: Bool[Array, " D"], ratio: float = OUTLIER_RATIO
) -> Int[Array, ""]:
    """The first layer after which one of the channels is an outlier; L when none ever is.

    Layer 1 in Llama-2-7B. Sinks are known from there on, so the layers after it need not be run.
    """
    found = jnp.any((peaks > ratio) & channels, axis=1)
    return jnp.where(jnp.any(found), jnp.argmax(found), peaks.shape[0])


def channel_scores(
    hidden: Float[Array, "B T D"],
    channels: Bool[Array, " D"],
    where: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """How far each token stands out in the model's stable outlier channels.

    max over the channels of |h_td| in the unit of `channel_peaks`

    Args:
        hidden: residual stream after the emergence layer. channels: of `stable_channels`.
        where: True for real tokens.
    Returns:
        Ratios, 0 without channels and for padding; a sink is above `OUTLIER_RATIO`.
    Source: KVSink, arXiv 2508.04257: top tokens of the stable outlier channels at one layer.
        Their constants could not be read, so that the bound is that of PrefixQuant.
    """
    size = _magnitude(hidden, where)
    ratio = _over(size, _usual(size)) * channels
    return jnp.max(jnp.nan_to_num(ratio, posinf=jnp.inf), axis=-1)


def _magnitude(hidden: Array, where: Array | None) -> Array:
    """|h|, NaN for padding."""
    size = jnp.abs(at_least_float32(hidden))
    return size if where is None else jnp.where(where[..., None], size, jnp.nan)


def _usual(size: Array) -> Array:
    """What an entry of each channel usually is, `[*lead, 1, 1, D]`, and nowhere below the median."""
    channel = jnp.nanmedian(size, axis=(-3, -2), keepdims=True)
    return jnp.maximum(channel, jnp.nanmedian(size, axis=(-3, -2, -1), keepdims=True))


def _over(size: Array, unit: Array) -> Array:
    """size / unit: inf over a unit of 0, 0 for 0."""
    ratio = size / jnp.where(unit > 0, unit, 1.0)
    return jnp.where(unit > 0, ratio, jnp.where(size > 0, jnp.inf, 0.0))
