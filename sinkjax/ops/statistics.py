"""Metric formulas for attention sinks: pure functions on arrays, shared by training and diagnosis.

Every function works on the reduced arrays that a model returns (`Output.statistics`, nothing of
size [T, S]); `from_weights` and `from_hidden` reduce dense arrays to the same ones. Where the field
has several definitions under one name they carry different names here, because their numbers are
not comparable. Formulas for outliers in activations are in `outliers.py` and re-exported here.
Rates and shares are fractions in [0, 1]; papers print percent. Norms and entropies are in the
model's own units and in nats.

Leading axes are written `*lead` (usually layers L), followed by the samples B.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from sinkjax.ops.outliers import anisotropy as anisotropy
from sinkjax.ops.outliers import from_hidden as from_hidden
from sinkjax.ops.outliers import is_spike as is_spike
from sinkjax.ops.outliers import kurtosis_bondarenko as kurtosis_bondarenko
from sinkjax.ops.outliers import kurtosis_osp as kurtosis_osp
from sinkjax.ops.outliers import kurtosis_pooled as kurtosis_pooled
from sinkjax.ops.outliers import massive_activations as massive_activations
from sinkjax.ops.outliers import matrix_entropy as matrix_entropy
from sinkjax.ops.outliers import max_inf_norm as max_inf_norm
from sinkjax.ops.outliers import outlier_token_rate as outlier_token_rate
from sinkjax.ops.outliers import psi as psi
from sinkjax.ops.outliers import top_over_median as top_over_median
from sinkjax.ops.precision import at_least_float32
from sinkjax_kernels.statistics.reference import reduce_weights


def _check_order(order: str) -> None:
    if order not in ("per_sample", "mean_first"):
        raise ValueError(f"order: expected 'per_sample' or 'mean_first', got {order!r}")


def _check_position(position: int, size: int) -> None:
    if not 0 <= position < size:
        raise ValueError(f"position: expected 0 <= position < {size} (keys), got {position}")


def _masked_mean(x: Array, where: Array | None, axis: int | tuple[int, ...]) -> Array:
    """Mean over the entries allowed by `where`; 0 where there is none (never NaN)."""
    if where is None:
        return jnp.mean(x, axis=axis)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=axis)
    return jnp.sum(jnp.where(where, x, 0.0), axis=axis) / jnp.maximum(count, 1)


# --- reductions of dense arrays to the arrays of Output.statistics


def from_weights(
    weights: Float[Array, "*lead T S"], where: Bool[Array, "..."] | None = None
) -> dict[str, Array]:
    """Reduce dense attention weights to the statistics that a model returns.

    key_mass_j = sum_i A_ij;  key_mass_normalized_j = sum_i |A_ij| / (sum_j |A_ij| + 1e-8);
    key_count_j = #{i that see j};  row_mass_i = sum_j A_ij;  entropy_i = -sum_j p_ij ln p_ij with
    p_i the row-normalised weights.

    Lets every metric of this file be applied to weights from anywhere (another library, a paper).

    Args:
        weights: attention weights, zero where a query does not see a key.
        where: visibility, broadcastable to `weights`; by default causal by index (key <= query).
    Returns:
        The entries named above: `[*lead, S]` per key and `[*lead, T]` per query, float32 at least.
    Source: 2410.10781 (proxy scores: `lit_gpt/inference/model_attn_kernel_infer.py`).
    """
    weights = at_least_float32(weights)
    num_queries, num_keys = weights.shape[-2:]
    if where is None:
        where = jnp.tri(num_queries, num_keys, dtype=bool)
    where = jnp.broadcast_to(where, weights.shape)
    weights = jnp.where(where, weights, 0.0)
    # Weights from anywhere come without their logits and without their sink.
    found = reduce_weights(weights, where, weights, jnp.zeros(weights.shape[:-1], weights.dtype))
    return {k: x for k, x in found._asdict().items() if k not in ("sink_mass", "max_logit")}


# --- attention to one key


def importance(
    key_mass: Float[Array, "*lead S"], key_count: Num[Array, "*lead S"]
) -> Float[Array, "*lead S"]:
    """Importance of each key: the mean weight it gets from the queries that can see it.

    alpha_k = sum_{i sees k} A_ik / #{i sees k};  for plain causal attention the divisor is T-k+1.

    The query at the key itself is included. Raw or row-normalised is the caller's choice: pass
    `key_mass` or `key_mass_normalized`; for normalisers with an extra term in the denominator
    (softmax1, sink logits, softpick) the two differ a lot, report both.

    Args:
        key_mass: weight summed over queries. key_count: number of queries that see the key.
    Returns:
        alpha; 0 for a key that nobody sees.
    Source: Gu et al. 2410.10781 §2, `eval_sink_open_source.py`.
    """
    count = jnp.asarray(key_count, key_mass.dtype)
    return jnp.where(count > 0, key_mass / jnp.maximum(count, 1), 0.0)


def uniform_importance(num_queries: int, position: int = 0) -> float:
    """alpha_k of uniform causal attention, the baseline a sink has to beat.

    alpha_k = (1/(T-k+1)) sum_{i=k}^{T} 1/i  (k = position + 1);  alpha_1 = H_T / T.

    Args:
        num_queries: T, tokens. position: key index, counted from 0.
    Returns:
        0.074 at T=64, 0.127 at T=32 for position 0.
    Source: identity; `reference` value of the step-0 model in Gu et al. 2410.10781.
    """
    _check_position(position, num_queries)
    terms = [1.0 / i for i in range(position + 1, num_queries + 1)]
    return sum(terms) / len(terms)


def sink_rate_by_head(
    key_mass: Float[Array, "*lead B N S"],
    key_count: Num[Array, "*lead B N S"],
    epsilon: float = 0.3,
    position: int = 0,
    order: str = "per_sample",
) -> Float[Array, "*lead N"]:
    """Sink rate of each head: how often the importance of one key passes a threshold.

    per_sample:  mean_b 1[alpha_k^b > eps]          (the released code of Gu et al.)
    mean_first:  1[mean_b alpha_k^b > eps]

    The order matters: alpha = (.1, .1, .9) over three samples gives 1/3 and 1.
    Samples in which nobody sees the key do not count.

    Args:
        key_mass: raw or row-normalised weight per key. key_count: queries that see it.
        epsilon: threshold on alpha. position: key index. order: see above.
    Returns:
        Fraction in [0, 1] per leading index and head.
    Raises:
        ValueError: unknown order, position outside the keys.
    Source: Gu et al. 2410.10781 eq. 6; eps=0.3, T=64 there; 0.2 in 2504.20966; 0.8 in 2504.02732.
    """
    _check_order(order)
    _check_position(position, key_mass.shape[-1])
    alpha = importance(key_mass, key_count)[..., position]
    seen = key_count[..., position] > 0
    if order == "per_sample":
        return _masked_mean((alpha > epsilon).astype(alpha.dtype), seen, axis=-2)
    return (_masked_mean(alpha, seen, axis=-2) > epsilon).astype(alpha.dtype)


def sink_rate(
    key_mass: Float[Array, "*lead B N S"],
    key_count: Num[Array, "*lead B N S"],
    epsilon: float = 0.3,
    position: int = 0,
    order: str = "per_sample",
) -> Float[Array, ""]:
    """Sink rate Sink_k^eps of a model: the mean of `sink_rate_by_head` over layers and heads.

    Sink_k^eps = mean_{l,n} mean_b 1[alpha_k^{l,n,b} > eps]   (order="per_sample")

    Args, Raises: as `sink_rate_by_head`.
    Returns:
        Fraction in [0, 1] (papers print percent).
    Source: Gu et al. 2410.10781 eq. 6.
    """
    return jnp.mean(sink_rate_by_head(key_mass, key_count, epsilon, position, order))


def first_token_share_by_layer(
    key_mass: Float[Array, "*lead B N S"], key_count: Num[Array, "*lead B N S"], position: int = 0
) -> Float[Array, "*lead"]:
    """Share of attention on the first token, per layer ("F-Attn").

    F_l = mean_{b,n,i} A^{l,b,n}_{i,1}, over all queries i (0 for one that does not see it).

    Equals the mean importance for full causal attention; smaller for windowed layers, whose late
    queries do not see the token. Queries are counted as the keys that somebody sees, since in
    self-attention every real token sees itself and padding is seen by none.

    Args:
        key_mass: raw (or row-normalised) weight per key. key_count: queries that see it.
        position: key index.
    Returns:
        Share in [0, 1] per layer for weights that sum to one.
    Source: Qiu et al. 2505.06708 §4.2 (baseline .467, element-wise gate .048 as mean over layers).
    """
    _check_position(position, key_mass.shape[-1])
    queries = jnp.sum(key_count > 0, axis=-1)
    share = key_mass[..., position] / jnp.maximum(queries, 1)
    return _masked_mean(share, queries > 0, axis=(-2, -1))


def first_token_share(
    key_mass: Float[Array, "*lead B N S"], key_count: Num[Array, "*lead B N S"], position: int = 0
) -> Float[Array, ""]:
    """Share of attention on the first token: the mean of `first_token_share_by_layer` over layers.

    F-Attn = mean_l mean_{b,n,i} A^{l,b,n}_{i,1}

    Args, Source: as `first_token_share_by_layer`.
    Returns:
        Scalar share.
    """
    return jnp.mean(first_token_share_by_layer(key_mass, key_count, position))


def entropy_by_head(
    entropy: Float[Array, "*lead B N T"], query_mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "*lead N"]:
    """Mean attention entropy of each head, in nats.

    mean_{b,t} H_t,  H_t = -sum_j p_tj ln p_tj,  p = row-normalised weights.

    Low entropy with high importance of one key is a dormant head.

    Args:
        entropy: entropy per query, nats. query_mask: True for real tokens; default all.
    Returns:
        Nats per head. Uniform causal attention gives mean_t ln t.
    Source: standard; no single canonical source.
    """
    where = None if query_mask is None else query_mask[:, None, :]
    return _masked_mean(entropy, where, axis=(-3, -1))


# --- norms: value drain, key norm, residual peak


def norm_ratio(
    norm: Float[Array, "*lead S"], position: int = 0, where: Bool[Array, "..."] | None = None
) -> Float[Array, "*lead"]:
    """Norm of one token over the mean norm of the others.

    r = ||x_k|| / mean_{t != k} ||x_t||

    Args:
        norm: L2 norm per token. position: k. where: True for real tokens, broadcastable.
    Returns:
        Ratio; 1 means the token is like the others; 0 if there are no others.
    Source: Guo et al. 2410.13835; Gu et al. 2410.10781 §3.
    """
    size = norm.shape[-1]
    _check_position(position, size)
    others = jnp.arange(size) != position
    if where is not None:
        others = others & where
    mean = _masked_mean(norm, others, axis=-1)
    return jnp.where(mean > 0, norm[..., position] / jnp.where(mean > 0, mean, 1.0), 0.0)


def _kv_ratio(norm: Array, order: str, position: int, token_mask: Array | None) -> Array:
    _check_order(order)
    where = None if token_mask is None else token_mask[:, None, :]
    if order == "per_sample":
        return jnp.mean(norm_ratio(norm, position, where), axis=(-2, -1))
    seen = None if where is None else jnp.any(where, axis=(0, 1))
    return norm_ratio(_masked_mean(norm, where, axis=(-3, -2)), position, seen)


def value_norm_drain(
    value_norm: Float[Array, "*lead B K S"],
    order: str = "mean_first",
    position: int = 0,
    token_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "*lead"]:
    """Value-state drain: how small the values of the sink token are.

    mean_first:  vbar_t = mean_{b,k} ||v_t||,  drain = vbar_1 / mean_{t>1} vbar_t  (Gu et al.)
    per_sample:  drain = mean_{b,k} ( ||v_1|| / mean_{t>1} ||v_t|| )

    A head that has nothing to say looks at the sink and reads a value near zero: drain falls well
    below 1 while the sink forms. There is no threshold in the papers.

    Args:
        value_norm: L2 norm of values over the head size. order: see above. position: sink index.
        token_mask: True for real tokens.
    Returns:
        Drain per layer.
    Source: Guo et al. 2410.13835; `eval_activations_open_source.py` of 2410.10781.
    """
    return _kv_ratio(value_norm, order, position, token_mask)


def key_norm_ratio(
    key_norm: Float[Array, "*lead B K S"],
    order: str = "mean_first",
    position: int = 0,
    token_mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "*lead"]:
    """Norm of the sink's key over the mean key norm of the other tokens (keys after RoPE).

    As `value_norm_drain` with k for v. Sink keys are usually short and win by direction.

    Args: as `value_norm_drain`.
    Returns:
        Ratio per layer.
    Source: Gu et al. 2410.10781 §3, `eval_activations_open_source.py`.
    """
    return _kv_ratio(key_norm, order, position, token_mask)


def residual_peak(
    residual_norm: Float[Array, "*lead B R T"],
    position: int = 0,
    token_mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "*lead R"]:
    """Residual-state peak: norm of the sink token's hidden state over the others' mean.

    hbar_t = mean_b ||h_t||,  peak = hbar_1 / mean_{t>1} hbar_t

    Args:
        residual_norm: L2 norm of hidden states; R half-blocks (after attention, after MLP).
        position: sink index. token_mask: True for real tokens.
    Returns:
        Ratio per half-block.
    Source: Guo et al. 2410.13835; Gu et al. 2410.10781.
    """
    where = None if token_mask is None else token_mask[:, None, :]
    seen = None if token_mask is None else jnp.any(token_mask, axis=0)
    return norm_ratio(_masked_mean(residual_norm, where, axis=-3), position, seen)


# --- geometry


def key_cosines(
    query: Float[Array, "*lead T N H"], key: Float[Array, "*lead T K H"], position: int = 0
) -> tuple[Float[Array, "*lead N"], Float[Array, "*lead N"]]:
    """Cosine of queries with the sink's key, and with the other keys they see.

    sink:   mean_{t > k} cos(q_t, k_k)
    others: mean_{t > k} mean_{j <= t, j != k} cos(q_t, k_j)

    A sink key is often short but aligned with all queries. Pass states before or after RoPE, the
    answers differ; analysis only, it forms [T, T] cosines.

    Args:
        query, key: states of one sample per leading index, N a multiple of K. position: k.
    Returns:
        (sink, others), cosines per query head.
    Source: Gu et al. 2410.10781 §3.
    """
    length, groups = key.shape[-3], query.shape[-2] // key.shape[-2]
    _check_position(position, length)
    query, key = at_least_float32(query), at_least_float32(key)
    key = jnp.repeat(key, groups, axis=-2)
    query = query / (jnp.linalg.norm(query, axis=-1, keepdims=True) + 1e-30)
    key = key / (jnp.linalg.norm(key, axis=-1, keepdims=True) + 1e-30)
    cosine = jnp.einsum("...tnh,...snh->...nts", query, key, precision="highest")
    index = jnp.arange(length)
    later = index > position
    others = (index[None, :] <= index[:, None]) & (index[None, :] != position)
    to_others = _masked_mean(cosine, others, axis=-1)
    return (
        _masked_mean(cosine[..., position], later, axis=-1),
        _masked_mean(to_others, later, axis=-1),
    )


# --- gates, dead heads


def gate_statistics(gate: Float[Array, "..."]) -> dict[str, Float[Array, ""]]:
    """Mean of the gate values and the fraction that is exactly zero.

    Args:
        gate: values after the sigmoid (or other gate function), any shape.
    Returns:
        "mean" and "zero_fraction", scalars.
    Source: Qiu et al. 2505.06708 ("gate score": .116 element-wise, .172 head-wise).
    """
    gate = at_least_float32(gate)
    return {"mean": jnp.mean(gate), "zero_fraction": jnp.mean((gate == 0).astype(gate.dtype))}


def dead_heads(
    head_output: Float[Array, "..."], floor: float = 1e-6, tokens: float = 0.95
) -> Bool[Array, "*lead N"]:
    """Heads that give nothing at almost every token.

    #{(b, t): max_h |o_bth| < 1e-6} >= 0.95 B T

    Args:
        head_output: output of each head before the output projection. floor: magnitude that counts
            as nothing. tokens: fraction of tokens at which it must.
    Returns:
        One flag per head.
    Source: softpick 2504.20966 (9.1 % of heads at 340M).
    """
    silent = jnp.max(jnp.abs(at_least_float32(head_output)), axis=-1) < floor
    return jnp.mean(silent.astype(jnp.float32), axis=(-3, -2)) >= tokens
