"""Attention statistics on TPU: what sinks draw, from q, k and the log-sum-exp of the forward pass.

One matmul and one exponential per visited tile, memory linear in T and S, time linear in T for a window
with sink tokens. Where a sink logit takes its share, a second pass divides each row by its own mass
before it sums over the queries. `tpu_sweep` has the kernel, `tpu_tour` the tiles that it visits.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers, varying
from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.flash.tpu_tiles import VMEM_BYTES, pad_axis
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.statistics import ranges as common
from sinkjax_kernels.statistics.reference import AttentionStatistics
from sinkjax_kernels.statistics.tpu_sweep import Static, sweep
from sinkjax_kernels.statistics.tpu_tour import Tour, tour_of


def check(
    query, key, bias, mask, visibility, sinks, lse=None, *,
    normalizer, scale, logits_soft_cap, normalizer_params=None, interpret: Any = False,
) -> None:  # fmt: skip
    """Raises where `attention_statistics` would, without tracing a kernel.

    Raises:
        NotImplementedError: the call is not served, with the reason and what serves it.
        ValueError: shapes that do not go together.
    """
    common.check(
        query, key, bias, mask, visibility, sinks, lse, normalizer, normalizer_params, interpret
    )
    need = 2 * 4 * key.shape[1]  # two buffers of the sums of all keys
    if need > VMEM_BYTES // 2:
        raise NotImplementedError(
            f"key: sums of {key.shape[1]} keys take {need >> 20} of {VMEM_BYTES >> 20} MiB of VMEM; "
            "`statistics.xla` serves them"
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
    blocks: tuple[int, int] | None = None,
    interpret: Any = False,
) -> AttentionStatistics:
    """`statistics.reference.attention_statistics` on a TPU, for causal masks that are ranges.

    Args:
        lse: log-sum-exp of the forward pass. Of `flash.pallas_tpu` it fits best: queries are rounded
            here as there.
        blocks: queries and keys of a tile, multiples of 128; shorter sequences use smaller ones. By
            default as many as keep the program short.
        interpret: True or `pltpu.InterpretParams()` to run on any backend.

    Raises:
        NotImplementedError, ValueError: as `check`.
    """
    options = {"normalizer": normalizer, "scale": scale, "logits_soft_cap": logits_soft_cap}
    options |= {"normalizer_params": normalizer_params, "interpret": interpret}
    check(query, key, bias, mask, visibility, sinks, lse, **options)
    assert lse is not None
    ranges, (T, S) = (
        common.ranges_of(visibility).within(query.shape[1]),
        (query.shape[1], key.shape[1]),
    )
    H = query.shape[-1]
    tour = tour_of(ranges, T, S, *(blocks or _blocks(ranges, H, query.dtype)))
    static = Static(tour, logits_soft_cap, interpret)
    bounds = common.segment_bounds(visibility) if ranges.has_segments else None
    lse = lse.astype(jnp.float32).swapaxes(1, 2)
    operands = varying.alike((*_padded(tour, _folded(query, scale, logits_soft_cap), key), lse))
    query, key, lse = operands
    starts = None if bounds is None else bounds[0]

    def run(lse, with_rows):
        more = ((0, 0), (0, 0), (0, tour.query_blocks * tour.block_q - T))
        lse = jnp.pad(lse * common.LOG2_E, more, constant_values=common.NEVER)
        rows, keys = sweep(static, query, key, lse, starts, with_rows)
        return [x[..., :T] for x in rows], keys[..., :S]

    rows, key_mass = run(lse, True)
    rows = common.Rows(*rows)
    sums_to_one = sinks is None and normalizers.constant_sink(normalizer) is None
    normalized = key_mass if sums_to_one else run(lse + common.log_mass(rows), False)[1]
    return common.assemble(
        rows,
        key_mass,
        normalized,
        common.key_count(ranges, T, S, bounds),
        common.row_sinks(normalizer, sinks, lse),
    )


def _blocks(ranges: Ranges, H: int, dtype) -> tuple[int, int]:
    """By bundles of the static schedule of v5e and v6e, H = 128, bfloat16: large tiles cost less.

    A tile is unrolled, and there is one more kind of it in packed rows.
    """
    if dtype == jnp.float32:
        return (512, 512) if H <= 128 else (256, 512)
    return (1024, 1024) if H <= 128 and not ranges.has_segments else (512, 512)


def _folded(query, scale: float, soft_cap: float | None):
    """Queries with the scale in them, in their own dtype, as in the forward pass."""
    fold = scale * common.LOG2_E if soft_cap is None else scale / soft_cap
    return (query.astype(jnp.float32) * fold).astype(query.dtype)


def _padded(tour: Tour, query, key):
    """Heads first, and whole blocks."""
    query = pad_axis(query.swapaxes(1, 2), tour.query_blocks * tour.block_q, 2)
    return query, pad_axis(key.swapaxes(1, 2), tour.key_blocks * tour.block_k, 2)
