"""Attention on NVIDIA GPUs by cuDNN, for full and causal masks with and without a window.

cuDNN has no sinks here; `cudnn_sinks` adds them exactly, forward and backward. What its mask cannot
say (sink tokens beside a window, segments, …) is refused: `flash.pallas_gpu` serves it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash.cudnn_calls import Cudnn
from sinkjax_kernels.flash.cudnn_sinks import attend
from sinkjax_kernels.flash.refusals import check_operands
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.varying import alike

LARGEST_HEAD = 128
"""Of every GPU that cuDNN's fused attention runs on; Hopper and later take 256."""


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params=None,
    largest_head: int = LARGEST_HEAD,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`flash.reference.attention` by cuDNN, in bfloat16 or float16.

    A log-sum-exp that is differentiated costs one more call forward and one more backward. On several
    devices call it inside `jax.shard_map`: XLA does not split the calls by itself. cuDNN adds up
    gradients in no fixed order unless XLA is told to (`--xla_gpu_deterministic_ops`).

    Args:
        largest_head: 256 where the caller knows of a Hopper GPU or a later one.

    Raises:
        NotImplementedError, ValueError: as `check`.
    """
    check(
        query, key, value, bias, mask, visibility, sinks,
        normalizer=normalizer, scale=scale, logits_soft_cap=logits_soft_cap,
        normalizer_params=normalizer_params, largest_head=largest_head,
    )  # fmt: skip
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((query.shape[2],), constant, jnp.float32)
    window = _window(visibility, query.shape[1], key.shape[1])
    kernel = Cudnn(scale, visibility.is_causal, window)
    operands = alike((query, key, value, sinks))
    out, lse = attend(kernel, *operands)
    return out, lse.swapaxes(1, 2)


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
    largest_head: int = LARGEST_HEAD,
) -> None:
    """Whether `attention` serves the call; looks at shapes and static fields only.

    Raises:
        NotImplementedError: it does not, with the reason and what does.
        ValueError: shapes that do not go together.
    """
    check_operands(query, key, value, bias, mask, normalizer_params, dtypes=("bfloat16", "float16"))
    T, H, S = query.shape[1], query.shape[3], key.shape[1]
    if value.shape[3] != H or H % 8 or H > largest_head:
        raise NotImplementedError(
            f"head size: multiples of 8 up to {largest_head}, the same for keys and values, got {H} "
            f"and {value.shape[3]}; `flash.pallas_gpu` or `flash.xla` serves others"
        )
    kinds = (normalizers.Softmax, normalizers.Softmax1, normalizers.SoftmaxN)
    if not isinstance(normalizer, kinds):
        raise NotImplementedError(
            f"normalizer: softmax, softmax1 and softmax_n have a log-sum-exp to add a sink to, got "
            f"{normalizer}; `flash.pallas_gpu`, `flash.xla` or `flash.rows` serves it"
        )
    if logits_soft_cap is not None:
        raise NotImplementedError("logits_soft_cap: cuDNN has none; `flash.xla` serves it")
    if sinks is not None and sinks.ndim != 1:
        raise NotImplementedError(
            "sinks: one logit per head is built, not one per token; `flash.xla` serves it"
        )
    _window(visibility, T, S)


def _window(visibility: Visibility, T: int, S: int) -> int | None:
    """The window of the mask, None where it hides nothing.

    Raises:
        NotImplementedError: cuDNN cannot be told this mask.
    """
    v = visibility
    other = "; `flash.pallas_gpu` or `flash.xla` serves it"
    given: dict[str, Any] = {
        "segments": v.query_segment_ids is not None or v.key_segment_ids is not None,
        "sequence lengths": v.query_lengths is not None or v.key_lengths is not None,
        "a mask without the query's own key": v.excludes_self,
        "positions other than 0, 1, 2, … known while tracing": (v.query_start, v.key_start)
        != (0, 0),
    }
    for name, is_given in given.items():
        if is_given:
            raise NotImplementedError(f"mask: cuDNN is not given {name}{other}")
    left = None if v.left is None or v.left >= T - 1 else v.left
    if not v.is_causal:
        right = None if v.right is None or v.right >= S - 1 else v.right
        if left is not None or right is not None:
            raise NotImplementedError(
                "mask: a window without causality leaks in cuDNN, which takes only its left bound "
                f"(jax-ml/jax#39576){other}"
            )
        return None
    if left is None:
        return None
    if v.num_sink_tokens is not None and left + 1 + v.num_sink_tokens >= T:
        return None
    if v.key_is_sink is not None:
        raise NotImplementedError(f"mask: cuDNN has no sink tokens beside a window{other}")
    if T > S:
        raise NotImplementedError(
            f"mask: a window over fewer keys ({S}) than queries ({T}) leaves rows that see nothing, "
            f"which cuDNN does not define{other}"
        )
    return left + 1
