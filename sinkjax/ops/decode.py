"""Attention of a few queries on a ring cache: validation, and the choice of the kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from sinkjax.ops.attention import check_params
from sinkjax_kernels import decode, normalizers

_KERNELS = {"reference": decode.decode_attention}
_PREFERENCE = ("reference",)


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S Hv"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"] | Int[Array, "B K S"],
    sink_query: Float[Array, "B T N H"] | None = None,
    num_sink_slots: int = 0,
    num_sink_tokens: int = 0,
    window: int | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: str | normalizers.Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    r"""$o_t = \sum_j w_{tj} v_j$ over the slots j with $0 \le p_j \le p_t$ and
    ($p_j$ < `num_sink_tokens` or $p_t - p_j$ < `window`).

    What a decoder calls on a cache of constant size: `[B, K, S, H]` leaves are read as they lie,
    slots may be in any order, and the sink slots may be scored by a query of their own, so that
    nothing in the cache is ever rotated twice.

    Args:
        query: rotated at its own position.
        key, value: cache leaves; query head n reads key/value head n // (N/K).
        query_positions: −1 is padding and sees nothing.
        key_positions: per slot, or per key/value head and slot; −1 is empty.
        sink_query: the query for the first `num_sink_slots` slots; None is `query`.
        num_sink_slots: how many leading slots `sink_query` scores.
        num_sink_tokens: keys at positions below are exempt from the window.
        window: number of keys seen back, the query's own included; None is unbounded.
        bias: added to the logits after scale and soft cap; S counts slots, in the order of the cache.
        sinks: sink logits per query head, or per token and head; only with softmax.
        normalizer: a description or its name, as in `dot_product_attention`; `elu` maps query and key
            first.
        normalizer_params: learned leaves of the normaliser, one number per query head.
        scale: of the logits; None is 1/√H.
        logits_soft_cap: c in c·tanh(x/c), after the scale.
        return_residual: also return the log-sum-exp, sink included.
        implementation: a name, or names in order of preference; None chooses.

    Returns:
        the output in the query's dtype, 0 for a row that sees nothing; with `return_residual` also
        the log-sum-exp, float32 at least.

    Raises:
        ValueError: shapes or options that do not fit.
        NotImplementedError: the one implementation asked for cannot serve the call.
        ExceptionGroup: none of several can; it lists every reason.

    Source: `sinkjax_kernels.decode`, held to its `reference.py`.
    """
    description = normalizers.resolve(normalizer)
    B, T, N, H = query.shape
    K, S = key.shape[1:3]
    if N % K:
        raise ValueError(
            f"query: the number of heads N must be divisible by the number of key/value heads K, "
            f"got N={N}, K={K}"
        )
    if not 0 <= num_sink_slots <= S:
        raise ValueError(f"num_sink_slots: expected 0 to S={S}, got {num_sink_slots}")
    if num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens: expected at least 0, got {num_sink_tokens}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    if sinks is not None and not description.takes_sinks:
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {description}")
    if sinks is not None and sinks.shape not in ((N,), (B, T, N)):
        raise ValueError(f"sinks: expected [N]={(N,)} or [B, T, N]={(B, T, N)}, got {sinks.shape}")
    if bias is not None and (
        bias.ndim != 4
        or any(size not in (1, full) for size, full in zip(bias.shape, (B, N, T, S), strict=True))
    ):
        raise ValueError(
            f"bias: expected a shape broadcastable to {(B, N, T, S)}, got {bias.shape}"
        )
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap: expected more than 0, got {logits_soft_cap}")
    if return_residual and not description.has_log_sum_exp:
        raise ValueError(f"return_residual: normalizer {description} has no log-sum-exp")
    params = check_params(description, normalizer_params, N)
    query, key = (normalizers.feature_map(description, x) for x in (query, key))
    if sink_query is not None:
        sink_query = normalizers.feature_map(description, sink_query)
    if key_positions.ndim == 2:
        key_positions = key_positions[:, None]
    results: Any = _dispatch(implementation)(
        query,
        key,
        value,
        query_positions=query_positions,
        key_positions=key_positions,
        sink_query=sink_query,
        num_sink_slots=num_sink_slots,
        num_sink_tokens=num_sink_tokens,
        window=window,
        bias=bias,
        sinks=sinks,
        normalizer=description,
        normalizer_params=params,
        scale=H**-0.5 if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
    )
    return results if return_residual else results[0]


def _dispatch(implementation: str | Sequence[str] | None):
    """The kernels in order of preference, as one function that falls through the unable ones."""
    names = (
        _PREFERENCE
        if implementation is None
        else (implementation,)
        if isinstance(implementation, str)
        else tuple(implementation)
    )
    unknown = [name for name in names if name not in _KERNELS]
    if unknown or not names:
        raise ValueError(
            f"implementation: expected one of {', '.join(_KERNELS)} or several of them, "
            f"got {implementation!r}"
        )

    def call(*args, **options) -> tuple[jax.Array, jax.Array | None]:
        reasons: list[Exception] = []
        for name in names:
            try:
                return _KERNELS[name](*args, **options)
            except NotImplementedError as reason:
                reasons.append(reason)
        if len(reasons) == 1:
            raise reasons[0]
        raise ExceptionGroup(f"decode_attention: none of {', '.join(names)} can serve it", reasons)

    return call
