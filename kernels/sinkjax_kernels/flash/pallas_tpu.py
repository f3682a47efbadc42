"""Attention on TPU: Pallas kernels for softmax, softmax1, softmax_n and sink logits over ranges.

Time and memory are linear in T for a window with sink tokens, forward and backward; there is no mask
array and no table. `tpu_forward` and `tpu_backward` hold the kernels, `ranges` what they can mask.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.ranges import Ranges, ranges_of
from sinkjax_kernels.flash.tpu_backward import backward
from sinkjax_kernels.flash.tpu_blocks import Blocks
from sinkjax_kernels.flash.tpu_forward import forward
from sinkjax_kernels.flash.tpu_tiles import Static
from sinkjax_kernels.masks import Visibility

LARGEST_HEAD = 256


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility | None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params=None,
    ranges: Ranges | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """`flash.reference.attention` on a TPU, for causal masks that are ranges.

    Args:
        visibility: the mask.
        ranges: the mask where the caller knows it as ranges; `visibility` is not looked at then.
        blocks: block sizes, `tpu_blocks.BLOCKS` of a chip; those of v5e by default.
        interpret: True or `pltpu.InterpretParams()` to run on any backend.

    Raises:
        NotImplementedError: the call is not one of these, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    B, T, N, H = query.shape
    S, K, Hv = value.shape[1:]
    if key.shape != (B, S, K, H) or value.shape[0] != B or N % K:
        raise ValueError(
            f"query, key, value: expected [B, T, N, H], [B, S, K, H], [B, S, K, Hv] with N a multiple "
            f"of K, got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    _refuse(query, key, value, bias, mask, sinks, normalizer, normalizer_params)
    if ranges is None:
        if visibility is None:
            raise ValueError("visibility, ranges: expected one of them, got neither")
        ranges = ranges_of(visibility)
    if ranges.has_segments or ranges.offset:
        raise NotImplementedError(
            "segments and shifted queries are not built; `flash.xla` serves them"
        )
    ranges = ranges.within(T)
    if S < T:
        raise NotImplementedError(
            f"key: fewer keys ({S}) than queries ({T}) are not built; `flash.xla` serves them"
        )
    if ranges.num_sink_tokens > tiles.GRAIN:
        raise NotImplementedError(
            f"num_sink_tokens: at most {tiles.GRAIN} beside a window, got {ranges.num_sink_tokens}; "
            "`flash.xla` serves more"
        )
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((N,), constant, jnp.float32)
    static = Static(
        ranges, scale, logits_soft_cap, sinks is not None, blocks or Blocks(), interpret
    )
    _fit(static, T, H, Hv, query.dtype.itemsize)
    if sinks is None:
        sinks = jnp.zeros((N,), jnp.float32)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key[:, :T], value[:, :T]))
    results: Any = _attend(static, query, key, value, sinks)
    out, lse = results
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def _refuse(query, key, value, bias, mask, sinks, normalizer, normalizer_params) -> None:
    """Raises for what these kernels do not compute."""
    kinds = (normalizers.Softmax, normalizers.Softmax1, normalizers.SoftmaxN)
    if not isinstance(normalizer, kinds) or normalizer_params:
        raise NotImplementedError(
            f"normalizer: softmax, softmax1 and softmax_n are built, got {normalizer}; "
            "`flash.xla` or `flash.rows` serves it"
        )
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise NotImplementedError(f"{name}: arrays are not read; `flash.xla` serves them")
    if sinks is not None and sinks.ndim != 1:
        raise NotImplementedError(
            "sinks: one logit per head is built, not one per token; `flash.xla` serves it"
        )
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            "query, key, value: all float32 or all bfloat16 are built, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}; `flash.xla` serves them"
        )
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD:
        raise NotImplementedError(
            f"head size: at most {LARGEST_HEAD}, got {query.shape[-1]} and {value.shape[-1]}; "
            "`flash.xla` serves more"
        )


def _fit(static: Static, T: int, H: int, Hv: int, itemsize: int) -> None:
    """Raises where a kernel that keeps the keys of a head in VMEM would not fit."""
    wide, need = tiles.up(H) + tiles.up(Hv), 0
    for most, size in (
        (static.blocks.query, 2 * itemsize),  # two buffers each for keys and values
        (static.blocks.query_backward, 2 * itemsize + 4),  # and the sums of dk and dv
    ):
        narrow, block = tiles.layout(static.ranges, T, most)
        if not narrow:
            need = max(need, size * tiles.up(T, block) * wide)
    if need > 0.8 * tiles.VMEM_BYTES:  # the rest is for the query block and its scores
        raise NotImplementedError(
            f"{T} keys of a causal or widely windowed head take {need >> 20} MiB of the "
            f"{tiles.VMEM_BYTES >> 20} MiB of VMEM; `flash.xla` serves them"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query, key, value, sinks) -> tuple[Array, Array]:
    out, lse = forward(static, query, key, value, sinks.astype(jnp.float32))
    return out, lse[:, :, 0]


def _forward_rule(static, query, key, value, sinks):
    results: Any = _attend(static, query, key, value, sinks)
    out, lse = results
    return (out, lse), (query, key, value, sinks, out, lse)


def _backward_rule(static, residuals, cotangents):
    query, key, value, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    wide = [x.astype(jnp.float32) for x in (d_out, out)]
    delta = (wide[0] * wide[1]).sum(-1) - d_lse  # D − dL, [B, N, T]
    grads: Any = backward(static, query, key, value, d_out, lse[:, :, None], delta[:, :, None])
    share = jnp.exp(sinks.astype(jnp.float32)[:, None] - lse) if static.has_sinks else 0
    d_sinks = -(share * delta).sum((0, 2))
    return *grads, d_sinks.astype(sinks.dtype)


_attend.defvjp(_forward_rule, _backward_rule)
