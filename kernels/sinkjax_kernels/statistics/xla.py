"""Attention statistics in plain XLA, in memory linear in S: one block of query rows at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.statistics import reference
from sinkjax_kernels.statistics.reference import AttentionStatistics
from sinkjax_kernels.varying import as_in


def attention_statistics(
    query,
    key,
    bias,
    mask,
    visibility: Visibility,
    sinks,
    lse=None,
    *,
    normalizer,
    scale,
    logits_soft_cap,
    normalizer_params=None,
    block_q: int = 128,
) -> AttentionStatistics:
    """`statistics.reference.attention_statistics`, holding `[B, N, block_q, S]` at a time."""
    B, T, N, _ = query.shape
    S, block = key.shape[1], min(block_q, T)
    blocks, more = -(-T // block), -T % block
    # Rows of padding count no keys, unlike those of a call that is shorter than its buffer.
    lengths = jnp.full((1,), T, jnp.int32)
    if visibility.query_lengths is not None:
        lengths = jnp.minimum(visibility.query_lengths, T)
    visibility = dataclasses.replace(visibility.pad(more, 0), query_lengths=lengths)
    rows = T + more

    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def widen(x, axis) -> Any:
        if x is None or x.ndim <= axis or x.shape[axis] == 1:
            return x
        return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])

    query, lse = widen(query, 1), widen(lse, 1)
    sinks = widen(sinks, 1) if sinks is not None and sinks.ndim == 3 else sinks
    bias, mask = widen(bias, 2), widen(mask, 2)

    def cut(x, start, axis) -> Any:
        if x is None or x.shape[axis] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, start, block, axis)

    def some_rows(i):
        start = i * block
        return reference.attention_statistics(
            cut(query, start, 1),
            key,
            cut(bias, start, 2),
            cut(mask, start, 2),
            visibility.rows(start, block),
            cut(sinks, start, 1) if sinks is not None and sinks.ndim == 3 else sinks,
            cut(lse, start, 1),
            normalizer=normalizer,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            normalizer_params=normalizer_params,
        )

    if blocks == 1:
        return some_rows(0)

    per_key = {"key_mass", "key_mass_normalized", "key_count"}

    def step(total, i):
        part = some_rows(i)
        sums = {name: total[name] + getattr(part, name) for name in per_key}
        return sums, {n: x for n, x in part._asdict().items() if n not in per_key}

    zeros = as_in({name: jnp.zeros((B, N, S), dtype) for name in per_key}, (query, key))
    sums, row_blocks = jax.lax.scan(step, zeros, jnp.arange(blocks))
    per_row = {
        name: jnp.moveaxis(x, 0, 2).reshape(B, N, rows)[..., :T] for name, x in row_blocks.items()
    }
    return AttentionStatistics(**sums, **per_row)
