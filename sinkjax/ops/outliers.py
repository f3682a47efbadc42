"""Metric formulas for outliers in activations: massive entries, kurtosis, spectra, token norms.

The counterpart of `statistics.py`, which has the formulas for attention and re-exports these. All
functions take hidden states `[*lead, T, D]`, or the arrays that `from_hidden` reduces them to
(`Output.statistics` carries those as residual_norm, residual_top and residual_median). Three
published kurtoses carry three names, because their numbers are not comparable.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax.ops.precision import at_least_float32


def from_hidden(hidden: Float[Array, "*lead T D"]) -> dict[str, Array]:
    """Reduce hidden states to norm per token, three largest magnitudes and median magnitude.

    norm_t = ||h_t||_2;  top = the three largest |h| over (T, D);  median = median |h| over (T, D).

    Args:
        hidden: one hidden state (layer or half-block) per leading index.
    Returns:
        "norm" [*lead, T], "top" [*lead, 3] (largest first), "median" [*lead].
    Source: Sun et al. 2402.17762, `main_llm.py --exp2`.
    """
    hidden = at_least_float32(hidden)
    flat = jnp.sort(jnp.abs(hidden).reshape(*hidden.shape[:-2], -1), axis=-1)
    return {
        "norm": jnp.linalg.norm(hidden, axis=-1),
        "top": flat[..., :-4:-1],
        "median": jnp.median(flat, axis=-1),
    }


# --- massive activations


def massive_activations(
    hidden: Float[Array, "*lead T D"], absolute: float = 100.0, ratio: float = 1000.0
) -> Bool[Array, "*lead T D"]:
    """Massive activations by the criterion of Sun et al., element by element.

    |x| > 100  and  |x| >= 1000 median|x|,  the median over the whole hidden state (T, D).

    Args:
        hidden: hidden states of one sample per leading index. absolute, ratio: the two bounds.
    Returns:
        Mask of the massive entries.
    Source: Sun et al. 2402.17762 §2 (the authors call the criterion loose).
    """
    size = jnp.abs(at_least_float32(hidden))
    median = jnp.median(size.reshape(*size.shape[:-2], -1), axis=-1)[..., None, None]
    return (size > absolute) & (size >= ratio * median)


def psi(top: Float[Array, "*lead 3"], median: Float[Array, "*lead"]) -> Float[Array, "*lead"]:
    """Ratio of the largest to the median magnitude of a hidden state.

    Psi = max|x| / median|x|  over all tokens and channels.

    In small models use it together with *where* the maximum sits: it can pass 1000 on tokens that
    are no sink.

    Args:
        top: three largest magnitudes, largest first. median: median magnitude.
    Returns:
        Psi; inf for a hidden state whose median is 0 and whose maximum is not.
    Source: "Mind the Spike" 2609.32808; Sun et al. 2402.17762.
    """
    return top_over_median(top, median)[..., 0]


def top_over_median(
    top: Float[Array, "*lead 3"], median: Float[Array, "*lead"]
) -> Float[Array, "*lead 3"]:
    """The three largest magnitudes over the median magnitude, largest first.

    Args: as `psi`.
    Returns:
        Ratios; inf over a zero median, 0 for an all-zero hidden state.
    Source: Sun et al. 2402.17762, `main_llm.py --exp2`.
    """
    median = median[..., None]
    ratio = top / jnp.where(median > 0, median, 1.0)
    return jnp.where(median > 0, ratio, jnp.where(top > 0, jnp.inf, 0.0))


def is_spike(
    top: Float[Array, "*lead 3"],
    median: Float[Array, "*lead"],
    absolute: float = 100.0,
    ratio: float = 1000.0,
) -> Bool[Array, "*lead"]:
    """Whether a hidden state has a spike, from its reduced statistics.

    Psi >= 1000  and  max|x| >= 100   (both bounds inclusive, unlike `massive_activations`)

    Args:
        top, median: as `psi`. absolute, ratio: the two bounds.
    Returns:
        One flag per hidden state.
    Source: "Mind the Spike" 2609.32808.
    """
    return (psi(top, median) >= ratio) & (top[..., 0] >= absolute)


def max_inf_norm(hidden: Float[Array, "M B T D"]) -> Float[Array, ""]:
    """Largest infinity norm over modules.

    max_m mean_b max_{t,d} |x^{m,b}_{t,d}|

    Args:
        hidden: outputs of M modules.
    Returns:
        Scalar, in units of the activations.
    Source: Bondarenko et al. 2306.12929, `validate_clm.py`.
    """
    return jnp.max(jnp.mean(jnp.max(jnp.abs(at_least_float32(hidden)), axis=(-2, -1)), axis=-1))


# --- kurtosis: three incompatible definitions


def kurtosis_bondarenko(hidden: Float[Array, "*lead T D"]) -> Float[Array, "*lead"]:
    """Kurtosis of one module's output per sample, tokens and channels flattened; Gaussian = 3.

    mean((x - mu)^4) / (s^4 + 1e-6),  s the unbiased standard deviation over (T, D).

    The paper averages over samples, then reports the mean and the maximum over modules.

    Args:
        hidden: one sample per leading index.
    Returns:
        Kurtosis per leading index (not excess).
    Source: Bondarenko et al. 2306.12929, `transformers_language/utils.py`.
    """
    flat = at_least_float32(hidden).reshape(*hidden.shape[:-2], -1)
    centred = flat - jnp.mean(flat, axis=-1, keepdims=True)
    return jnp.mean(centred**4, axis=-1) / (jnp.std(flat, axis=-1, ddof=1) ** 4 + 1e-6)


def kurtosis_osp(
    hidden: Float[Array, "*lead T D"], token_mask: Bool[Array, "..."] | None = None
) -> Float[Array, "*lead"]:
    """Excess kurtosis over channels per token, with an uncentred numerator; Gaussian = 0.

    mean_t ReLU( mean_d(x^4) / s_t^4 - 3 ),  s_t the unbiased standard deviation over D.

    Args:
        hidden: the paper uses all L+1 hidden states and averages over them too.
        token_mask: True for real tokens, broadcastable to [*lead, T].
    Returns:
        Excess kurtosis per leading index, never negative.
    Source: OSP 2506.19697, `evaluate_kurtosis.py` (torch's default, unbiased std).
    """
    hidden = at_least_float32(hidden)
    fourth = jnp.mean(hidden**4, axis=-1)
    deviation = jnp.std(hidden, axis=-1, ddof=1) ** 4
    ratio = jnp.where(deviation > 0, fourth / jnp.where(deviation > 0, deviation, 1.0), 0.0)
    excess = jnp.maximum(ratio - 3.0, 0.0)
    where = jnp.broadcast_to(True if token_mask is None else token_mask, excess.shape)
    return jnp.sum(jnp.where(where, excess, 0.0), axis=-1) / jnp.maximum(jnp.sum(where, axis=-1), 1)


def kurtosis_pooled(hidden: Float[Array, "..."], excess: bool = False) -> Float[Array, ""]:
    """Kurtosis of all activations pooled: texts, layers, tokens and channels; Gaussian = 3.

    mean((x - mu)^4) / mean((x - mu)^2)^2   (minus 3 with excess=True)

    Args:
        hidden: everything that is pooled. excess: the paper does not say which it reports.
    Returns:
        Scalar.
    Source: softpick 2504.20966 §4 (axes and excess not stated there).
    """
    hidden = at_least_float32(hidden)
    centred = hidden - jnp.mean(hidden)
    variance = jnp.mean(centred**2)
    value = jnp.mean(centred**4) / jnp.where(variance > 0, variance, 1.0) ** 2
    return value - 3.0 if excess else value


# --- spectra and token norms


def _squared_singular_values(hidden: Array) -> Array:
    """Descending, from the smaller of the two Gram matrices; tiny negatives are clipped."""
    hidden = at_least_float32(hidden)
    if hidden.shape[-2] > hidden.shape[-1]:
        hidden = jnp.swapaxes(hidden, -1, -2)
    gram = jnp.einsum("...td,...sd->...ts", hidden, hidden, precision="highest")
    return jnp.maximum(jnp.linalg.eigvalsh(gram)[..., ::-1], 0.0)


def matrix_entropy(hidden: Float[Array, "*lead T D"]) -> Float[Array, "*lead"]:
    """Von Neumann entropy of a representation; low when one row dominates it.

    -sum_i p_i ln p_i,  p_i = sigma_i^2 / sum_j sigma_j^2,  sigma = singular values of [T, D].

    Args:
        hidden: representation of one sample per leading index.
    Returns:
        Nats, between 0 (rank one) and ln min(T, D).
    Source: Queipo-de-Llano et al. 2510.06477.
    """
    spectrum = _squared_singular_values(hidden)
    total = jnp.sum(spectrum, axis=-1, keepdims=True)
    share = spectrum / jnp.where(total > 0, total, 1.0)
    return -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)), axis=-1)


def anisotropy(hidden: Float[Array, "*lead T D"]) -> Float[Array, "*lead"]:
    """Share of the largest singular direction in a representation.

    sigma_1^2 / ||X||_F^2

    Args:
        hidden: representation of one sample per leading index.
    Returns:
        Between 1/min(T, D) and 1.
    Source: Queipo-de-Llano et al. 2510.06477.
    """
    spectrum = _squared_singular_values(hidden)
    total = jnp.sum(spectrum, axis=-1)
    return spectrum[..., 0] / jnp.where(total > 0, total, 1.0)


def outlier_token_rate(
    norm: Float[Array, "*lead T"], threshold: float | None = None
) -> Float[Array, "*lead"]:
    """Fraction of tokens whose output norm is an outlier (ViT registers, norm artefacts).

    mean_t 1[||h_t|| > tau],  tau = threshold, or mean + 3 standard deviations of the norms.

    Args:
        norm: L2 norm of output tokens. threshold: tau; None takes it from the data.
    Returns:
        Fraction in [0, 1].
    Source: Darcet et al. 2309.16588 (tau = 150 for DINOv2 ViT-g, 2.37 % of tokens); 2506.08010
        (mean + 3 sigma).
    """
    if threshold is None:
        bound = jnp.mean(norm, axis=-1, keepdims=True) + 3 * jnp.std(norm, axis=-1, keepdims=True)
    else:
        bound = jnp.asarray(threshold, norm.dtype)
    return jnp.mean((norm > bound).astype(norm.dtype), axis=-1)
