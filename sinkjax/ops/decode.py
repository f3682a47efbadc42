"""Attention of a few queries on a ring cache: validation, and the choice of the kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array, Bool, Float, Int, Int8

from sinkjax.ops.attention import check_params
from sinkjax.ops.dispatch import Implementation, dispatch
from sinkjax.ops.shards import per_shard
from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import pallas_gpu, pallas_tpu, reference
from sinkjax_kernels.decode.reference import Step
from sinkjax_kernels.varying import alike

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": Implementation(pallas_tpu.decode_attention, pallas_tpu.check, "tpu"),
    "pallas_gpu": Implementation(pallas_gpu.decode_attention, pallas_gpu.check, "cuda"),
    "reference": Implementation(reference.decode_attention),
}
"""By name, in the order in which `implementation=None` tries them."""

STEPS: dict[str, Implementation] = {
    "pallas_tpu": Implementation(pallas_tpu.decode_step, pallas_tpu.check, "tpu"),
    "pallas_gpu": Implementation(pallas_gpu.decode_step, pallas_gpu.check, "cuda"),
    "reference": Implementation(reference.decode_step),
}
"""The same of `decode_step`."""

_LETTERS = {
    "query": "BTNH",
    "sink_query": "BTNH",
    "new_key": "BTKH",
    "new_value": "BTKH",
    "key": "BKSH",
    "value": "BKSH",
    "key_scale": "BKS",
    "value_scale": "BKS",
    "slots": "B",
    "query_positions": "BT",
    "key_positions": "BKS",
    "bias": "BNTS",
    "mask": "BKTS",
    "sinks": "N BTN",
    "normalizer_params": "N",
}


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"] | Int[Array, "B K S"],
    sink_query: Float[Array, "B T N H"] | None = None,
    num_sink_slots: int = 0,
    num_sink_tokens: int = 0,
    window: int | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "B #K T S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: str | normalizers.Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    r"""$o_t = \sum_j w_{tj} v_j$ over the slots j with $0 \le p_j \le p_t$ and
    (j < `num_sink_slots` or $p_j$ < `num_sink_tokens` or $p_t - p_j$ < `window`).

    What a decoder calls on a cache of constant size: `[B, K, S, H]` leaves are read as they lie,
    slots may be in any order, the leading ones may hold sink tokens from anywhere in the text, and
    those may be scored by a query of their own, so that nothing in the cache is ever rotated twice.

    Args:
        query: rotated at its own position.
        key, value: cache leaves; query head n reads key/value head n // (N/K).
        query_positions: −1 is padding and sees nothing.
        key_positions: per slot, or per key/value head and slot; −1 is empty.
        sink_query: the query for the first `num_sink_slots` slots; None is `query`.
        num_sink_slots: how many leading slots are sink slots: exempt from the window, whatever their
            positions, and scored by `sink_query` where there is one.
        num_sink_tokens: keys at positions below are exempt from the window, wherever they lie.
        window: number of keys seen back, the query's own included; None is unbounded.
        bias: added to the logits after scale and soft cap; S counts slots, in the order of the cache.
        mask: False where a query may not look although the positions allow it; kernels take none.
        sinks: sink logits per query head, or per token and head; only with softmax.
        normalizer: a description or its name, as in `dot_product_attention`; `elu` maps query and key
            first.
        normalizer_params: learned leaves of the normaliser, one number per query head.
        scale: of the logits; None is 1/√H.
        logits_soft_cap: c in c·tanh(x/c), after the scale.
        key_scale, value_scale: of int8 leaves, what each slot is multiplied with.
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
    arrays, static = _checked(
        query, key, value, query_positions, key_positions, sink_query, num_sink_slots,
        num_sink_tokens, window, bias, sinks, normalizer, normalizer_params, scale, logits_soft_cap,
    )  # fmt: skip
    if return_residual and not static["normalizer"].has_log_sum_exp:
        raise ValueError(f"return_residual: normalizer {static['normalizer']} has no log-sum-exp")
    arrays["key"] = normalizers.feature_map(static["normalizer"], key)
    arrays |= {"value": value, "key_scale": key_scale, "value_scale": value_scale}
    lse = "BTN" if static["normalizer"].has_log_sum_exp else None
    table = IMPLEMENTATIONS
    if mask is not None:
        arrays["mask"] = mask
        table = {"reference": IMPLEMENTATIONS["reference"]}
    results = _dispatch(table, implementation, arrays, static, ("BTNH", lse))
    return results if return_residual else results[0]


def decode_step(
    query: Float[Array, "B 1 N H"],
    new_key: Float[Array, "B 1 K H"],
    new_value: Float[Array, "B 1 K Hv"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    slots: Int[Array, " B"],
    query_positions: Int[Array, "B 1"],
    key_positions: Int[Array, "B S"] | Int[Array, "B K S"],
    sink_query: Float[Array, "B 1 N H"] | None = None,
    num_sink_slots: int = 0,
    num_sink_tokens: int = 0,
    window: int | None = None,
    bias: Float[Array, "#B #N 1 #S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B 1 N"] | None = None,
    normalizer: str | normalizers.Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Step:
    """`decode_attention` of one token per row that is written into the cache first.

    Kernels write it where it lies: donate the leaves to the compiled step. Why one function: XLA would
    copy a leaf that is written by one operation and read by a kernel as another buffer.

    Args:
        new_key, new_value: of the token; int8 leaves take it quantised, with a scale per head.
        slots: where it goes; outside the cache, −1 say, it is not written.
        key_positions: those after the step.

    Returns:
        output, log-sum-exp or None, and the leaves after the step.

    Raises:
        NotImplementedError: also for `elu`, whose keys go through a feature map.

    Source: `sinkjax_kernels.decode`, held to its `reference.py`.
    """
    arrays, static = _checked(
        query, key, value, query_positions, key_positions, sink_query, num_sink_slots,
        num_sink_tokens, window, bias, sinks, normalizer, normalizer_params, scale, logits_soft_cap,
    )  # fmt: skip
    if isinstance(static["normalizer"], normalizers.Elu):
        raise NotImplementedError("decode_step: elu maps its keys; write, then `decode_attention`")
    arrays |= {"new_key": new_key, "new_value": new_value, "slots": slots}
    arrays |= {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}
    scales = None if key_scale is None else "BKS"
    lse = "BTN" if static["normalizer"].has_log_sum_exp else None
    letters: Any = ("BTNH", lse, "BKSH", "BKSH", scales, scales)
    return _dispatch(STEPS, implementation, arrays, static, Step(*letters))


def _dispatch(table, implementation, arrays, static, results):
    """The first implementation that serves the call, on a mesh by each device for its part."""
    B, _, N, _ = arrays["query"].shape

    def run(arrays):
        return dispatch(table, implementation, alike(arrays), static)

    # Key heads that do not divide stay whole: to repeat them would copy the cache.
    sizes = {"B": B, "N": N, "K": arrays["key"].shape[1]}
    return per_shard(run, arrays, _LETTERS, results, sizes, may_repeat=False)


def _checked(
    query, key, value, query_positions, key_positions, sink_query, num_sink_slots, num_sink_tokens,
    window, bias, sinks, normalizer, normalizer_params, scale, logits_soft_cap,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Everything but the leaves, as arrays and what is static."""
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
    params = check_params(description, normalizer_params, N)
    query = normalizers.feature_map(description, query)
    if sink_query is not None:
        sink_query = normalizers.feature_map(description, sink_query)
    arrays = {
        "query": query, "query_positions": query_positions, "sink_query": sink_query,
        "key_positions": key_positions[:, None] if key_positions.ndim == 2 else key_positions,
        "bias": bias, "sinks": sinks, "normalizer_params": params,
    }  # fmt: skip
    static = {
        "num_sink_slots": num_sink_slots, "num_sink_tokens": num_sink_tokens, "window": window,
        "normalizer": description, "scale": H**-0.5 if scale is None else scale,
        "logits_soft_cap": logits_soft_cap,
    }  # fmt: skip
    return arrays, static
