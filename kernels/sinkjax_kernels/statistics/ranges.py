"""Attention statistics over ranges: what needs no kernel, and what no kernel takes.

Kernels walk over the tiles once, with the weights w = exp(x − LSE), and give the maximum of x and the
sums of w and w ln w of each row, and the sum of w of each key. The rest is here.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash.ranges import Ranges, ranges_of
from sinkjax_kernels.flash.segments import starts_of
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.statistics.reference import TINY, AttentionStatistics, sink_share

LARGEST_HEAD = 256
SHORTEST = 128
"""Queries of one tile."""
LOG2_E = math.log2(math.e)
NEVER = 1e30
"""The log-sum-exp of a row of padding, and minus the logit of a key that is not seen."""


class Rows(NamedTuple):
    """Sums over the keys of a row, `[B, N, T]` in float32.

    Attributes:
        top: largest visible logit; each query sees its own key at least.
        mass: sum of w.
        surprise: sum of w ln w, not divided by anything; at most about 0.
    """

    top: Float[Array, "B N T"]
    mass: Float[Array, "B N T"]
    surprise: Float[Array, "B N T"]


def check(
    query, key, bias, mask, visibility, sinks, lse, normalizer, normalizer_params, interpret
) -> Ranges:
    """The ranges of a call that the kernels serve.

    Raises:
        NotImplementedError: they do not, with the reason and what does.
        ValueError: shapes that do not go together.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape != (B, S, K, H) or N % K:
        raise ValueError(
            "query, key: expected [B, T, N, H] and [B, S, K, H] with N a multiple of K, got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    other = "; `statistics.xla` serves"
    kinds = (normalizers.Softmax, normalizers.Softmax1, normalizers.SoftmaxN)
    if not isinstance(normalizer, kinds) or normalizer_params:
        raise NotImplementedError(
            f"normalizer: softmax, softmax1 and softmax_n are built, got {normalizer}{other} it"
        )
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise NotImplementedError(f"{name}: arrays are not read{other} them")
    if lse is None:
        raise NotImplementedError(
            "lse: the kernels start from the log-sum-exp, which the forward pass returns with "
            f"`return_residual=True`{other} a call without it"
        )
    if lse.shape != (B, T, N):
        raise ValueError(f"lse: expected {[B, T, N]}, got {list(lse.shape)}")
    if sinks is not None and sinks.shape not in ((N,), (B, T, N)):
        raise ValueError(f"sinks: expected {[N]} or {[B, T, N]}, got {list(sinks.shape)}")
    if query.dtype != key.dtype or query.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            "query, key: both float32 or both bfloat16 are built, got "
            f"{query.dtype} and {key.dtype}{other} them"
        )
    if H > LARGEST_HEAD:
        raise NotImplementedError(f"head size: at most {LARGEST_HEAD}, got {H}{other} more")
    if T < SHORTEST and not interpret:
        raise NotImplementedError(
            f"query: fewer than {SHORTEST} queries ({T}) are one tile, which XLA does as fast{other} "
            "them"
        )
    ranges = ranges_of(visibility).within(T)
    if S < ranges.offset + T:
        raise NotImplementedError(
            f"key: {S} keys end before the last of {T} queries, which is at key "
            f"{ranges.offset + T - 1}{other} them"
        )
    return ranges


def segment_bounds(visibility: Visibility) -> tuple[Int[Array, "#B T"], Int[Array, "#B T"]]:
    """First index of each token's segment, and the first after it; a segment is a run of equal ids."""
    ids = visibility.query_segment_ids
    start, back = starts_of(ids)[:, 0], starts_of(ids[:, ::-1])[:, 0]
    return start, ids.shape[1] - back[:, ::-1]


def key_count(
    ranges: Ranges, T: int, S: int, bounds: tuple[Array, Array] | None
) -> Int[Array, "#B S"]:
    """Queries that see each key: its own to the last of its window, or of its segment for a sink token."""
    key = jnp.arange(S, dtype=jnp.int32)[None]
    start, end = (0, ranges.offset + T) if bounds is None else bounds
    last = end
    if ranges.window is not None:
        is_sink = key < start + ranges.num_sink_tokens
        last = jnp.where(is_sink, end, jnp.minimum(end, key + ranges.window))
    return jnp.maximum(last - jnp.maximum(key, ranges.offset), 0)


def row_sinks(normalizer, sinks, lse: Float[Array, "B N T"]) -> Float[Array, "B N T"]:
    """Weight on the sink logit of each row."""
    if sinks is not None:
        sinks = sinks[:, None] if sinks.ndim == 1 else sinks.swapaxes(1, 2)
        sinks = jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape)
    return sink_share(normalizer, lse, sinks, lse)


def log_mass(rows: Rows) -> Float[Array, "B N T"]:
    """ln of what a row is divided by, so that its weights sum to one."""
    return jnp.log(rows.mass + TINY)


def assemble(
    rows: Rows,
    key_mass: Float[Array, "B N S"],
    key_mass_normalized: Float[Array, "B N S"],
    count: Int[Array, "#B S"],
    sink_mass: Float[Array, "B N T"],
) -> AttentionStatistics:
    """All statistics. −Σ p ln p with p = w / (R + ε), R = Σ w, is (R ln(R + ε) − Σ w ln w) / (R + ε)."""
    entropy = (rows.mass * log_mass(rows) - rows.surprise) / (rows.mass + TINY)
    return AttentionStatistics(
        key_mass=key_mass,
        key_mass_normalized=key_mass_normalized,
        key_count=jnp.broadcast_to(count[:, None], key_mass.shape).astype(key_mass.dtype),
        row_mass=rows.mass,
        sink_mass=sink_mass,
        entropy=entropy,
        max_logit=rows.top,
    )
