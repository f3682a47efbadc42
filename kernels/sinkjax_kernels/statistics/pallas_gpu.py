"""Attention statistics on GPU through Triton: what sinks draw, from q, k and the log-sum-exp.

Two kernels, one by query blocks and then one by key blocks: no atomic operation, so that the result is
the same each time, and each row is divided by its own mass. Both skip the blocks that nobody sees.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers, varying
from sinkjax_kernels.flash.gpu_blocks import Blocks, blocks_for
from sinkjax_kernels.flash.gpu_policies import policy_of
from sinkjax_kernels.flash.gpu_tiles import Static
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.statistics import ranges as common
from sinkjax_kernels.statistics.gpu_keys import sums_of_keys
from sinkjax_kernels.statistics.gpu_rows import sums_of_rows
from sinkjax_kernels.statistics.reference import AttentionStatistics


def check(
    query, key, bias, mask, visibility, sinks, lse=None, *,
    normalizer, scale, logits_soft_cap, normalizer_params=None, interpret: bool = False,
) -> None:  # fmt: skip
    """Raises where `attention_statistics` would, without tracing a kernel.

    Raises:
        NotImplementedError: the call is not served, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    common.check(
        query, key, bias, mask, visibility, sinks, lse, normalizer, normalizer_params, interpret
    )


def attention_statistics(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    bias: Float[Array, "#B #N #T #S"] | None,
    mask: Bool[Array, "#B #N #T #S"] | None,
    visibility: Visibility,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None,
    lse: Float[Array, "B T N"] | None = None,
    *,
    normalizer: normalizers.Normalizer,
    scale: float,
    logits_soft_cap: float | None,
    normalizer_params=None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> AttentionStatistics:
    """`statistics.reference.attention_statistics` on a GPU, for causal masks that are ranges.

    Args:
        lse: log-sum-exp of the forward pass.
        blocks: tiles, of which rows take `forward` and keys `d_keys`; those of the flash kernels by
            default.
        interpret: run on any backend.

    Raises:
        NotImplementedError, ValueError: as `check`.
    """
    options = {"normalizer": normalizer, "scale": scale, "logits_soft_cap": logits_soft_cap}
    options |= {"normalizer_params": normalizer_params, "interpret": interpret}
    check(query, key, bias, mask, visibility, sinks, lse, **options)
    assert lse is not None
    T, H, S = query.shape[1], query.shape[3], key.shape[1]
    ranges = common.ranges_of(visibility).within(T)
    if blocks is None:
        blocks = blocks_for(H, query.dtype.itemsize, ranges.window)
    static = Static(ranges, policy_of(normalizer), scale, logits_soft_cap, blocks, interpret)
    starts, ends = common.segment_bounds(visibility) if ranges.has_segments else (None, None)
    natural = lse.astype(jnp.float32).swapaxes(1, 2)
    operands: Any = varying.alike((query, key, natural * common.LOG2_E, starts, ends))
    query, key, base2, starts, ends = operands
    rows = common.Rows(*sums_of_rows(static, query, key, base2, starts))
    factor = 1 / (rows.mass + common.TINY)
    key_mass, normalized = sums_of_keys(static, query, key, base2, factor, starts, ends)
    return common.assemble(
        rows,
        key_mass,
        normalized,
        common.key_count(ranges, T, S, None if ends is None else (starts, ends)),
        common.row_sinks(normalizer, sinks, natural),
    )
