"""Attention with sinks: one function, a superset of `jax.nn.dot_product_attention`.

This file checks and normalises the arguments, then hands the call to an implementation of
`sinkjax_kernels.flash`; `resolve` says which one would run.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops import sequence
from sinkjax.ops.dispatch import Implementation, Table, choose, dispatch
from sinkjax.ops.sequence import Plan as Plan
from sinkjax.ops.sequence.rectangle import rectangular
from sinkjax.ops.shards import free_axes, per_shard
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import cudnn, pallas_gpu, pallas_tpu, reference, rows, xla
from sinkjax_kernels.normalizers import Normalizer
from sinkjax_kernels.statistics import pallas_gpu as statistics_gpu
from sinkjax_kernels.statistics import pallas_tpu as statistics_tpu
from sinkjax_kernels.statistics import reference as statistics_reference
from sinkjax_kernels.statistics import xla as statistics_xla
from sinkjax_kernels.statistics.reference import AttentionStatistics
from sinkjax_kernels.varying import alike

logger = logging.getLogger("sinkjax")

Integers: TypeAlias = Int[Array, "..."] | Int[np.ndarray, "..."]
"""NumPy arrays are known while tracing."""

DENSE_WARNING_ELEMENTS = 2**26
"""Above this many logits (256 MiB in float32) the dense reference says so once when it runs."""


def _dense(query, key, **call):
    elements = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
    if elements > DENSE_WARNING_ELEMENTS and not _dense.told:
        _dense.told = True
        logger.warning("attention: the dense reference makes %d logits at once", elements)
    return reference.attention(query, key, **call)


_dense.told = False

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": Implementation(pallas_tpu.attention, pallas_tpu.check, "tpu"),
    "pallas_gpu": Implementation(pallas_gpu.attention, pallas_gpu.check, "cuda"),
    "cudnn": Implementation(cudnn.attention, cudnn.check, "cuda"),
    "xla": Implementation(xla.attention, xla.check),
    "rows": Implementation(rows.attention),
    "reference": Implementation(_dense),
}
"""By name, in the order in which `implementation=None` tries them."""

STATISTICS: dict[str, Implementation] = {
    "pallas_tpu": Implementation(statistics_tpu.attention_statistics, statistics_tpu.check, "tpu"),
    "pallas_gpu": Implementation(statistics_gpu.attention_statistics, statistics_gpu.check, "cuda"),
    "xla": Implementation(statistics_xla.attention_statistics),
    "reference": Implementation(statistics_reference.attention_statistics),
}
"""The same of `attention_statistics`."""

_LETTERS = {
    "query": "BTNH",
    "key": "BSKH",
    "value": "BSKH",
    "bias": "BNTS",
    "mask": "BNTS",
    "sinks": "N BTN",
    "lse": "BTN",
    "normalizer_params": "N",
    "query_positions": "BT",
    "key_positions": "BKS",
    "query_segment_ids": "BT",
    "key_segment_ids": "BS",
    "key_is_sink": "BKS",
    "query_lengths": "B",
    "key_lengths": "B",
}


@dataclasses.dataclass(frozen=True)
class _Call:
    """A checked call: operands by name, with a batch dimension, and what is static."""

    arrays: dict[str, Any]
    static: dict[str, Any]
    batched: bool

    @property
    def normalizer(self) -> Normalizer:
        return self.static["normalizer"]

    def dispatch(self, table: Table, implementation, results, plan: Plan | None = None) -> Any:
        """The first implementation that serves the call, on a mesh by each device for its part."""
        B, T, N, _ = self.arrays["query"].shape
        S, K = self.arrays["key"].shape[1:3]
        sizes = {"B": B, "N": N, "K": K}

        def attend(arrays, static):
            return dispatch(table, implementation, alike(arrays), static)

        def run(arrays):
            return attend(arrays, self.static)

        if plan is not None and plan.strategy != "whole":
            sizes |= {"T": T, "S": S}
            run = partial(sequence.STRATEGIES[plan.strategy], attend, static=self.static)
        if plan is not None and plan.strategy == "ring":
            table = rectangular(table)

        found = per_shard(run, self.arrays, _LETTERS, results, sizes)
        return found if self.batched else jax.tree.map(lambda x: x[0], found)


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K h"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    num_sink_tokens: int = 0,
    key_is_sink: Bool[Array, "..."] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "*B T N"] | None = None,
    normalizer: str | Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    query_positions: Integers | None = None,
    key_positions: Integers | None = None,
    query_segment_ids: Integers | None = None,
    key_segment_ids: Integers | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*B T N h"] | tuple[Float[Array, "*B T N h"], Float[Array, "*B T N"]]:
    r"""Scaled dot-product attention with sinks.

    $$o_t = \sum_j w_{tj} v_j,\quad w_t = \mathrm{normaliser}(\mathrm{cap}(\mathrm{scale}\; q_t k_j)
    + b_{tj} : j \text{ visible to } t)$$

    A call that is legal for `jax.nn.dot_product_attention` means the same here, with two exceptions:
    a row that sees nothing gives exactly 0, and the residual is float32 at least, differentiable
    and contains the sink. What is added: *sink logits* (a learned entry in the denominator), *sink
    tokens* (keys exempt from the window), other normalisers, positions and segments.

    Key j is visible to query t iff its position is not negative; both have the same segment;
    position j ≤ position t when causal; −right ≤ position t − position j ≤ left or j is a sink token;
    and lengths and `mask` allow it. A sink token is exempt from both window bounds and nothing else,
    so causal models pass `is_causal=True`. A window of W keys, the query's own included, is
    `local_window_size=(W - 1, 0)`.

    On a mesh each device computes its rows and heads, and where the axis `sequence` cuts the tokens its
    queries: causal windows move O(P + W) keys, other rows of softmax go round a ring, and what is left
    gathers all keys (`resolve_sequence` says which and why). Positions and segments decide: positions
    left out, and one array of segment ids for queries and keys, are what the first two need.

    Args:
        query: K divides N; the batch dimension may be absent, as in `jax.nn`.
        key: key/value head k serves query heads k·N/K … (k+1)·N/K − 1.
        value: its head size may differ from the key's.
        bias: added to the logits after scale and soft cap; broadcastable to `[B, N, T, S]`.
        mask: True where visible; broadcastable to `[B, N, T, S]`.
        scale: of the logits, a number or a learned scalar array; 1/√H by default.
        is_causal: hide keys of later positions (top-left aligned without positions).
        query_seq_lengths, key_value_seq_lengths: valid slots of the buffers.
        local_window_size: `(left, right)` in positions, without the query itself; an int n is (n, n).
        num_sink_tokens: keys with a position below it (with segments and no key positions: with an
            index within their segment below it) are sink tokens.
        key_is_sink: `[S]`, `[B, S]` or `[B, K, S]`; overrides `num_sink_tokens`.
        sinks: sink logits, `[N]` or per token `[B, T, N]`; only with softmax. Not scaled, not capped.
        normalizer: description or name, with arguments as in `"sigmoid(bias=-3.5)"` or
            `"relu(normalized=True)"`: `softmax softmax1 softmax_n sigsoftmax cog`, `sigmoid relu elu
            identity consmax`, `softpick rectified_only relu_softmax scaled_softpick`, `ssmax
            clipped_softmax normalized_clipped_softmax elastic_softmax`, `sparsemax entmax15 entmax`,
            `stick_breaking` (causal, and blind to the query's own position). `elu` maps query and
            key first.
        normalizer_params: learned leaves of the normaliser, `[N]` each, added to the constants of
            the description (`normalizers.Normalizer.parameters` names them).
        query_positions, key_positions: `[T]`/`[S]` or `[B, T]`/`[B, S]`, keys also `[B, K, S]`;
            the index in the buffer by default. A key at −1 is empty. Consecutive ones are best given as
            NumPy arrays: kernels that need no other know so while tracing.
        query_segment_ids, key_segment_ids: `[T]`/`[S]` or `[B, T]`/`[B, S]`; given together, for packed
            rows as one array. A segment is a run of equal ids: an id does not come back.
        logits_soft_cap: c, logits become c·tanh(logits / c).
        return_residual: also return the log-sum-exp, natural logarithm.
        implementation: a name, several to be tried in order, or None for the best.

    Returns:
        `[*B, T, N, h]` in the query's dtype; with `return_residual` also `[*B, T, N]`: the log-sum-exp
        with the sink included, for a row that sees nothing the sink logit or −inf.

    Raises:
        ValueError: shapes or options that do not fit together.
        NotImplementedError: the one named implementation cannot serve the call.
        ExceptionGroup: none of several could; it holds every reason.

    Source: sink logits, gpt-oss (2025); sink tokens, Xiao et al. 2023 (arXiv 2309.17453); `jax.nn`.
    """
    call = _check(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        num_sink_tokens=num_sink_tokens,
        key_is_sink=key_is_sink,
        sinks=sinks,
        normalizer=normalizer,
        normalizer_params=normalizer_params,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        logits_soft_cap=logits_soft_cap,
    )
    if return_residual and not call.normalizer.has_log_sum_exp:
        raise ValueError(f"return_residual: {call.normalizer} has no log-sum-exp to return")
    lse = "BTN" if call.normalizer.has_log_sum_exp else None
    plan = sequence.plan(call.arrays, call.static, free_axes().get("sequence", 1))
    if "sequence" in free_axes():
        sequence.tell(plan)
    found = call.dispatch(IMPLEMENTATIONS, implementation, ("BTNH", lse), plan)
    return found if return_residual else found[0]


def resolve(
    *args,
    implementation: str | Sequence[str] | None = None,
    platform: str | None = None,
    **kwargs,
) -> str:
    """Name of the implementation that `dot_product_attention` runs for these arguments.

    Arguments may be arrays or `jax.ShapeDtypeStruct`; nothing is computed.

    Args:
        platform: what is compiled for, "cpu", "cuda" or "tpu"; the default backend's by default.
    """
    backend = jax.default_backend()
    target: str = platform or {"gpu": "cuda"}.get(backend, backend)

    def ask(call):
        return choose(IMPLEMENTATIONS, implementation, target, call.arrays | call.static)

    return _traced(ask, args, kwargs)


_STATIC = {
    "scale", "is_causal", "local_window_size", "num_sink_tokens", "normalizer", "logits_soft_cap",
    "return_residual",
}  # fmt: skip


def resolve_sequence(*args, shards: int | None = None, **kwargs) -> Plan:
    """How `dot_product_attention` runs these arguments where `sequence` cuts the tokens, and why.

    Arguments may be arrays or `jax.ShapeDtypeStruct`; nothing is computed.

    Args:
        shards: devices along `sequence`; those of the current mesh by default.
    """
    number = free_axes().get("sequence", 1) if shards is None else shards
    return _traced(lambda call: sequence.plan(call.arrays, call.static, number), args, kwargs)


def _traced(ask, args, kwargs) -> Any:
    """What `ask` says of the checked call of these arguments, arrays or shapes."""
    kwargs = {n: x for n, x in kwargs.items() if n != "return_residual"}
    is_packed = kwargs.get("query_segment_ids") is kwargs.get("key_segment_ids") is not None
    if is_packed:  # one array has to stay one
        del kwargs["key_segment_ids"]
    known = {n for n, x in kwargs.items() if n in _STATIC or isinstance(x, np.ndarray)}
    found = []

    def trace(args, arrays):
        given = arrays | {n: kwargs[n] for n in known}
        if is_packed:
            given["key_segment_ids"] = given["query_segment_ids"]
        found.append(ask(_check(*args, **given)))

    jax.eval_shape(trace, args, {n: x for n, x in kwargs.items() if n not in known})
    return found[0]


def attention_weights(query, key, bias=None, mask=None, **options) -> Float[Array, "*B N T S"]:
    """The dense weights that `dot_product_attention` applies to the values; for analysis only.

    Takes the same arguments, without value, `return_residual` and `implementation`; float32 at least.
    """
    call = _check(query, key, key, bias, mask, **options)
    operands: dict[str, Any] = {n: x for n, x in call.arrays.items() if n != "value"}
    weights, _ = reference.attention_weights(**operands, **call.static)
    return weights if call.batched else weights[0]


def attention_statistics(
    query, key, bias=None, mask=None, *, lse=None, implementation=None, **options
) -> AttentionStatistics:
    """Attention mass per key, entropy, maximum logit and more, without a `[T, S]` array.

    What live sink metrics stand on. Takes the arguments of `dot_product_attention` without value;
    gradients are stopped, as these are measurements.

    Args:
        lse: the residual of the forward pass, where at hand: spares computing it again, and kernels
            need it.
        implementation: a name in `STATISTICS`, several to be tried in order, or None for the best.

    Returns:
        `AttentionStatistics`: `[B, N, S]` per key and `[B, N, T]` per query.
    """
    call = _check(query, key, key, bias, mask, **options)
    arrays = {name: x for name, x in call.arrays.items() if name != "value"}
    if lse is not None:
        arrays["lse"] = lse if call.batched else lse[None]
    call = dataclasses.replace(call, arrays=jax.lax.stop_gradient(arrays))
    letters: Any = ["BNS"] * 3 + ["BNT"] * 4
    return call.dispatch(STATISTICS, implementation, AttentionStatistics(*letters))


def _check(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    num_sink_tokens=0,
    key_is_sink=None,
    sinks=None,
    normalizer: str | Normalizer = "softmax",
    normalizer_params=None,
    query_positions=None,
    key_positions=None,
    query_segment_ids=None,
    key_segment_ids=None,
    logits_soft_cap=None,
) -> _Call:
    """Check a call, add the batch dimension and gather the masks into a `Visibility`."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    batched = query.ndim == 4
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name}: expected [B, T, N, H] or [T, N, H], all three alike, got shape {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating-point array, got {x.dtype}")
    if not batched:
        query, key, value = query[None], key[None], value[None]
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape != (B, S, K, H) or K == 0 or N % K:
        raise ValueError(
            f"key: expected [B={B}, S, K, H={H}] with K dividing N={N}, got {key.shape}"
        )
    if value.shape[:3] != (B, S, K):
        raise ValueError(f"value: expected [B={B}, S={S}, K={K}, h], got {value.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )

    described = normalizers.resolve(normalizer)
    params = check_params(described, normalizer_params, N)
    if described.needs_causal and not is_causal:
        raise ValueError(f"is_causal: expected True with normalizer {described}, got {is_causal}")
    query, key = (normalizers.feature_map(described, x) for x in (query, key))
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        if not described.takes_sinks:
            raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {described}")
        per_token = (B, T, N) if batched else (T, N)
        if sinks.shape not in ((N,), per_token):
            raise ValueError(f"sinks: expected [N={N}] or {list(per_token)}, got {sinks.shape}")
        sinks = sinks[None] if sinks.shape == (T, N) and not batched else sinks
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap: expected a number above 0, got {logits_soft_cap}")

    bias = _square("bias", bias, (B, N, T, S))
    mask = _square("mask", mask, (B, N, T, S))
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask: expected booleans, got {mask.dtype}; additive masks are `bias`")

    is_packed = query_segment_ids is key_segment_ids
    query_segment_ids = _uncut(query_segment_ids)
    key_segment_ids = query_segment_ids if is_packed else _uncut(key_segment_ids)
    visibility = masks.build(
        (B, T, S, K),
        is_causal=is_causal,
        local_window_size=local_window_size,
        num_sink_tokens=num_sink_tokens,
        key_is_sink=key_is_sink,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    if isinstance(scale, jax.Array):  # a learned scale goes into the query, to be differentiated
        query, scale = query * scale.astype(query.dtype), 1.0
    arrays: dict[str, Any] = dict(
        query=query, key=key, value=value, bias=bias, mask=mask, visibility=visibility, sinks=sinks
    )
    if params:
        arrays["normalizer_params"] = params
    static: dict[str, Any] = {
        "normalizer": described,
        "scale": 1 / math.sqrt(H) if scale is None else float(scale),
        "logits_soft_cap": logits_soft_cap,
    }
    return _Call(arrays, static, batched)


def _uncut(ids) -> Any:
    """Segment ids of whole rows: an explicit mesh allows no look at a neighbour across a cut."""
    layout = jax.typeof(ids).sharding if isinstance(ids, jax.Array) else None
    if layout is None or AxisType.Explicit not in layout.mesh.axis_types or layout.spec[-1] is None:
        return ids
    return jax.sharding.reshard(ids, PartitionSpec(*layout.spec[:-1], None))


def check_params(
    normalizer: Normalizer, params: Mapping[str, Array] | None, heads: int
) -> dict[str, Array]:
    """Learned leaves of a normaliser, one number per query head.

    Raises:
        ValueError: a name that the normaliser does not take, or another shape.
    """
    unknown = set(params or {}) - set(normalizer.parameters)
    if unknown:
        raise ValueError(
            f"normalizer_params: {normalizer} takes {list(normalizer.parameters)}, "
            f"got {sorted(unknown)}"
        )
    leaves = {name: jnp.asarray(leaf) for name, leaf in (params or {}).items()}
    for name, leaf in leaves.items():
        if leaf.shape != (heads,):
            raise ValueError(f"normalizer_params[{name!r}]: expected [N={heads}], got {leaf.shape}")
    return leaves


def _square(name: str, x, shape: tuple[int, ...]) -> Array | None:
    """A bias or mask as [b, n, t, s], each letter a size or 1."""
    if x is None:
        return None
    x = jnp.asarray(x)
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    if x.ndim != 4 or any(size not in (1, full) for size, full in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected a shape broadcastable to {shape}, got {x.shape}")
    return x
