"""Attention on GPU: Pallas kernels, compiled by Triton, for masks that are ranges.

Softmax with all its sinks, sigmoid, relu and softpick; causal, windows, sink tokens, packed segments,
an offset of the queries; grouped heads read their key head where it is. Time and memory are linear in
T for a window with sink tokens, forward and backward; there is no mask array and no table of blocks.

    gpu_spans      which tiles are visited, in closed form
    gpu_policies   what a normaliser computes in a tile
    gpu_tiles      loads, products and masks
    gpu_forward, gpu_backward, gpu_sinks   the kernels
    gpu_blocks     tile sizes
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash.gpu_backward import d_key_value, d_query
from sinkjax_kernels.flash.gpu_blocks import Blocks, blocks_for
from sinkjax_kernels.flash.gpu_forward import forward
from sinkjax_kernels.flash.gpu_policies import policy_of
from sinkjax_kernels.flash.gpu_sinks import add_far_queries
from sinkjax_kernels.flash.gpu_tiles import Static
from sinkjax_kernels.flash.ranges import Ranges, ranges_of
from sinkjax_kernels.flash.refusals import check_operands
from sinkjax_kernels.flash.saved import saved
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.varying import alike

LARGEST_HEAD = 256
LARGEST_GRID = 65535
"""Of the second and third axis of a CUDA grid."""


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
    interpret: bool = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`flash.reference.attention` on a GPU, for causal masks that are ranges.

    Args:
        blocks: tile sizes; those of `gpu_blocks` by default.
        interpret: run on any backend, slowly.

    Raises:
        NotImplementedError: the call is not one of these, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    ranges = _ranges(
        query, key, value, bias, mask, visibility, sinks, normalizer, normalizer_params, interpret
    )
    N = query.shape[2]
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((N,), constant, jnp.float32)
    if sinks is not None:  # [1 or B, N, 1 or T]
        sinks = sinks.astype(jnp.float32)
        sinks = sinks[None, :, None] if sinks.ndim == 1 else sinks.swapaxes(1, 2)
    starts = ends = None
    if ranges.has_segments:
        starts, ends = _segments(visibility.query_segment_ids)
    if blocks is None:
        widest = max(query.shape[-1], value.shape[-1])
        blocks = blocks_for(widest, query.dtype.itemsize, ranges.window)
    static = Static(ranges, policy_of(normalizer), scale, logits_soft_cap, blocks, interpret)
    operands = alike((query, key, value, sinks, starts, ends))
    results: Any = _attend(static, *operands)
    out, denominator = results
    return out, denominator.swapaxes(1, 2) if normalizer.has_log_sum_exp else None


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
    interpret: bool = False,
) -> None:
    """Raises what `attention` would, from shapes and dtypes alone."""
    _ranges(
        query, key, value, bias, mask, visibility, sinks, normalizer, normalizer_params, interpret
    )


def _ranges(
    query, key, value, bias, mask, visibility, sinks, normalizer, normalizer_params, interpret
) -> Ranges:
    """The mask of a call that these kernels serve; raises for another."""
    check_operands(
        query, key, value, bias, mask, normalizer_params,
        dtypes=("float32", "bfloat16", "float16"), interpret=interpret,
    )  # fmt: skip
    (B, T, N, H), S = query.shape, key.shape[1]
    if sinks is not None and sinks.shape not in ((N,), (B, T, N)):
        raise ValueError(f"sinks: expected {[N]} or {[B, T, N]}, got {list(sinks.shape)}")
    if sinks is not None and not normalizer.takes_sinks:
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {normalizer}")
    policy_of(normalizer)
    if max(H, value.shape[-1]) > LARGEST_HEAD:
        raise NotImplementedError(
            f"head size: at most {LARGEST_HEAD}, got {H} and {value.shape[-1]}; "
            "`flash.xla` serves more"
        )
    ranges = ranges_of(visibility)
    if S < ranges.offset + T:
        raise NotImplementedError(
            f"key: fewer keys ({S}) than the last query's position ({ranges.offset + T}) are not built; "
            "`flash.xla` serves them"
        )
    if B * N > LARGEST_GRID:
        raise NotImplementedError(
            f"batch and heads: at most {LARGEST_GRID} of them, got {B} x {N}; `flash.xla` serves more"
        )
    return ranges.within(T)


def _segments(ids):
    """Where the segment of each token begins and ends, as indices; a segment is a run of equal ids."""
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
    starts = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    lasts = jnp.diff(ids, axis=1, append=ids[:, -1:] - 1) != 0
    ends = jax.lax.cummin(
        jnp.where(lasts, index + 1, jnp.int32(ids.shape[1])), axis=1, reverse=True
    )
    return starts, ends


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, sinks, starts, ends) -> tuple[Array, Array | None]:
    return forward(static, query, key, value, sinks, starts)


def _forward_rule(static, query, key, value, sinks, starts, ends):
    results: Any = _attend(static, query, key, value, sinks, starts, ends)
    results = saved(results)
    return results, (query, key, value, sinks, starts, ends, *results)


def _backward_rule(static, residuals, cotangents):
    query, key, value, sinks, starts, ends, out, denominator = residuals
    d_out, d_denominator = cotangents
    delta = None
    if denominator is not None:
        weighed = d_out.astype(jnp.float32) * out.astype(jnp.float32)
        delta = weighed.sum(-1).swapaxes(1, 2) - d_denominator  # D − dL, [B, N, T]
    rows = (query, key, value, d_out, denominator, delta, starts)
    d_q = d_query(static, *rows)
    d_kv = d_key_value(static, *rows, ends)
    d_k, d_v = add_far_queries(static, *rows, ends, d_kv)
    d_sinks = None
    if sinks is not None:
        assert delta is not None
        share = -jnp.exp(sinks - denominator) * delta
        axes = [axis for axis in (0, 2) if sinks.shape[axis] < share.shape[axis]]
        d_sinks = share.sum(axes, keepdims=True)
    return d_q, d_k, d_v, d_sinks, None, None


_attend.defvjp(_forward_rule, _backward_rule)
