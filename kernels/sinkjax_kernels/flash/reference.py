"""The specification of attention: dense, float32 at least, and short enough to be read as a formula."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.masks import Visibility


def logits_and_mask(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility,
    *,
    scale: float,
    logits_soft_cap: float | None,
) -> tuple[Float[Array, "B N T S"], Bool[Array, "B N T S"]]:
    """scale → soft cap → bias, and who is visible; both dense."""
    group = query.shape[2] // key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key = jnp.repeat(key.astype(dtype), group, axis=2)
    logits = jnp.einsum("BTNH,BSNH->BNTS", query.astype(dtype), key, precision="highest") * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.astype(dtype)
    visible = visibility.visible()
    if visible.shape[1] > 1:
        visible = jnp.repeat(visible, group, axis=1)
    visible = jnp.broadcast_to(visible, logits.shape)
    return logits, visible if mask is None else visible & mask


def sinks_by_row(
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None, logits: Float[Array, "B N T S"]
) -> Float[Array, "B N T"] | None:
    """The sink logit of each row of logits."""
    if sinks is None:
        return None
    sinks = sinks[:, None] if sinks.ndim == 1 else sinks.swapaxes(1, 2)  # [N, 1] or [B, N, T]
    return jnp.broadcast_to(sinks, logits.shape[:-1])


def rows_for(
    normalizer: normalizers.Normalizer,
    visibility: Visibility,
    params: Mapping[str, Float[Array, " N"]] | None,
    group: int,
) -> tuple[Visibility, dict[str, Any]]:
    """The mask of a normaliser, and what `normalizers.weights` wants of it besides logits [B, N, T, S]."""
    if normalizer.excludes_self:
        visibility = dataclasses.replace(visibility, excludes_self=True)
    options: dict[str, Any] = {}
    if params:
        options["params"] = {name: leaf[:, None, None] for name, leaf in params.items()}
    if normalizer.family == "ordered" and not visibility.in_order:
        order = visibility.key_positions
        order = jnp.repeat(order, group, axis=1) if order.shape[1] > 1 else order
        options["key_order"] = order[:, :, None]
    return visibility, options


def attention_weights(
    query,
    key,
    bias,
    mask,
    visibility: Visibility,
    sinks,
    *,
    normalizer,
    scale,
    logits_soft_cap,
    normalizer_params=None,
) -> tuple[Float[Array, "B N T S"], Float[Array, "B T N"] | None]:
    """Dense weights and the log-sum-exp; arguments as in `attention`."""
    visibility, options = rows_for(
        normalizer, visibility, normalizer_params, query.shape[2] // key.shape[2]
    )
    logits, visible = logits_and_mask(
        query, key, bias, mask, visibility, scale=scale, logits_soft_cap=logits_soft_cap
    )
    sinks = sinks_by_row(sinks, logits)
    weights, lse = normalizers.weights(normalizer, logits, visible, sinks=sinks, **options)
    return weights, None if lse is None else lse.swapaxes(1, 2)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params: Mapping[str, Float[Array, " N"]] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    r"""$o_t = \sum_j w_{tj} v_j$ with $w_t$ = normaliser(cap(scale · $q_t k$) + bias) over visible keys.

    Every implementation has this signature and is held to this function by one conformance suite.

    Args:
        query, key, value: K divides N; query head n reads key/value head n // (N/K).
        bias: added to the logits after scale and soft cap.
        mask: True where visible, together with `visibility`.
        visibility: causality, window, sink tokens, segments, lengths.
        sinks: sink logits per query head, or per token and head; neither scaled nor capped.
        normalizer_params: learned leaves, added to the constants of the normaliser.

    Returns:
        the output in the query's dtype and the log-sum-exp (float32 at least, sink included), None
        for a normaliser without one.
    """
    weights, lse = attention_weights(
        query,
        key,
        bias,
        mask,
        visibility,
        sinks,
        normalizer=normalizer,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        normalizer_params=normalizer_params,
    )
    value = jnp.repeat(value.astype(weights.dtype), query.shape[2] // key.shape[2], axis=2)
    out = jnp.einsum("BNTS,BSNh->BTNh", weights, value, precision=jax.lax.Precision.HIGHEST)
    return out.astype(query.dtype), lse
