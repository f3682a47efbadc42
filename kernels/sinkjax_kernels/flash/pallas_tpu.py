"""Attention on TPU: Pallas kernels for causal, window, sink+window and packed masks.

Softmax with and without sinks, softpick, and elementwise normalisers. Time and memory are linear in T for
a window with sink tokens, forward and backward; there is no mask array and no table of blocks.
`tpu_forward` and `tpu_backward` hold the kernels, `ranges` what they can mask, `tpu_policies` how they
weigh.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers, varying
from sinkjax_kernels.flash import segments
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.ranges import Ranges, ranges_of
from sinkjax_kernels.flash.refusals import check_operands
from sinkjax_kernels.flash.saved import saved
from sinkjax_kernels.flash.tpu_backward import backward
from sinkjax_kernels.flash.tpu_blocks import Blocks, blocks_here
from sinkjax_kernels.flash.tpu_forward import forward
from sinkjax_kernels.flash.tpu_policies import policy_of
from sinkjax_kernels.flash.tpu_tiles import Static
from sinkjax_kernels.masks import Visibility

LARGEST_HEAD = 256
FAR = 1e30  # the logarithm of the denominator of a query that is not there: its weights are 0


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
    normalizer_params=None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`flash.reference.attention` on a TPU, for causal masks that are ranges.

    Args:
        blocks: block sizes, `tpu_blocks.blocks_here()` by default.
        interpret: True or `pltpu.InterpretParams()` to run on any backend.

    Raises:
        NotImplementedError: the call is not one of these, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    blocks = blocks or blocks_here()
    options: dict[str, Any] = {"normalizer": normalizer, "normalizer_params": normalizer_params}
    options |= {"scale": scale, "logits_soft_cap": logits_soft_cap}
    check(
        query, key, value, bias, mask, visibility, sinks,
        **options, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    T, N = query.shape[1:3]
    static = _static(query, visibility, sinks, **options, blocks=blocks, interpret=interpret)
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((N,), constant, jnp.float32)
    if sinks is None:
        sinks = jnp.zeros((N,), jnp.float32)
    starts = None
    if static.ranges.has_segments:
        ids = jnp.broadcast_to(visibility.query_segment_ids, (query.shape[0], T))
        starts = segments.starts_of(ids)
    seen = static.ranges.offset + T
    query, key, value = (x.swapaxes(1, 2) for x in (query, key[:, :seen], value[:, :seen]))
    results: Any = _attend(static, *varying.alike((query, key, value, sinks, starts)))
    out, lse = results
    lse = lse.swapaxes(1, 2) if normalizer.has_log_sum_exp else None
    return out.swapaxes(1, 2), lse


def check(
    query,
    key,
    value,
    bias,
    mask,
    visibility: Visibility,
    sinks,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params=None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> None:
    """Whether `attention` serves a call of these arrays, or of tracers or shapes in their place.

    Raises:
        NotImplementedError: it does not, with the reason and what does.
        ValueError: shapes that do not go together.
    """
    check_operands(
        query, key, value, bias, mask, normalizer_params,
        dtypes=("float32", "bfloat16"), interpret=interpret,
    )  # fmt: skip
    if sinks is not None and len(sinks.shape) != 1:
        raise NotImplementedError(
            "sinks: one logit per head is built, not one per token; `flash.xla` serves it"
        )
    T, H, S, Hv = query.shape[1], query.shape[3], *value.shape[1::2]
    if max(H, Hv) > LARGEST_HEAD:
        raise NotImplementedError(
            f"head size: at most {LARGEST_HEAD}, got {H} and {Hv}; `flash.xla` serves more"
        )
    static = _static(
        query, visibility, sinks, normalizer=normalizer, scale=scale,
        logits_soft_cap=logits_soft_cap, normalizer_params=None, blocks=blocks or blocks_here(),
        interpret=interpret,
    )  # fmt: skip
    if S < static.ranges.offset + T:
        raise NotImplementedError(
            f"key: fewer keys ({S}) than the queries reach ({static.ranges.offset + T}) are not built; "
            "`flash.xla` serves them"
        )
    _check_sinks(static.ranges)


def _static(
    query, visibility, sinks, *, normalizer, scale, logits_soft_cap, normalizer_params, blocks,
    interpret,
) -> Static:  # fmt: skip
    policy = policy_of(normalizer)
    has_sinks = sinks is not None or normalizers.constant_sink(normalizer) is not None
    ranges = ranges_of(visibility).within(query.shape[1])
    return Static(ranges, scale, logits_soft_cap, has_sinks, blocks, interpret, policy)


def _check_sinks(ranges: Ranges) -> None:
    """Raises where the sink tokens of a query block are no single tile."""
    P = ranges.num_sink_tokens
    if P > tiles.GRAIN:
        raise NotImplementedError(
            f"num_sink_tokens: at most {tiles.GRAIN} beside a window, got {P}; "
            "`flash.xla` serves more"
        )
    if ranges.has_segments and P and tiles.GRAIN // P * (ranges.window or 0) < tiles.GRAIN:
        raise NotImplementedError(
            f"num_sink_tokens: {P} beside a window of {ranges.window} in packed rows are more than a "
            "tile per block of 128 queries; `flash.xla` serves them"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, sinks, starts) -> tuple[Array, Array | None]:
    out, lse = forward(static, query, key, value, sinks.astype(jnp.float32), starts)
    return out, None if lse is None else lse[:, :, 0]


def _forward_rule(static, query, key, value, sinks, starts):
    results: Any = saved(_attend(static, query, key, value, sinks, starts))
    out, lse = results
    return (out, lse), (query, key, value, sinks, starts, out, lse)


def _backward_rule(static, residuals, cotangents):
    query, key, value, sinks, starts, out, lse = residuals
    d_out, d_lse = cotangents
    d_sinks, delta = jnp.zeros_like(sinks), None
    if static.policy.has_top:
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse  # D − dL
        if static.has_sinks:
            share = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse)
            d_sinks = -(share * delta).sum((0, 2)).astype(sinks.dtype)
    offset = static.ranges.offset
    static = dataclasses.replace(static, ranges=dataclasses.replace(static.ranges, offset=0))

    def in_front(x, filling=0.0):
        """As many queries without a gradient before the first as there are keys before it."""
        if x is None or not offset:
            return x
        width = [(0, 0), (0, 0), (offset, 0)] + [(0, 0)] * (x.ndim - 3)
        return jnp.pad(x, width, constant_values=filling)

    def compact(x):
        return None if x is None else x[:, :, None]

    query, d_out = in_front(query), in_front(d_out)
    lse, delta = compact(in_front(lse, FAR)), compact(in_front(delta))
    grads: Any = backward(static, query, key, value, d_out, lse, delta, starts)
    d_query, d_key, d_value = grads
    return d_query[:, :, offset:], d_key, d_value, d_sinks, None


_attend.defvjp(_forward_rule, _backward_rule)
