"""Attention in plain XLA, on every backend: blockwise, memory linear in S, with its own backward.

Tiles of [block_q, block_k] logits are visited in two nested loops; tiles that the mask empties
(`Visibility.block_table`) are skipped. The backward pass recomputes the tiles from q, k and the
log-denominator, as Dao et al. 2022 (FlashAttention, algorithm 4) do; sink logits get their gradient
from two arrays it has anyway, d s = −sum_t exp(s − LSE_t) (D_t − dL_t), in float32.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash.families import Family, family_of, fold_params
from sinkjax_kernels.flash.saved import saved
from sinkjax_kernels.masks import Visibility
from sinkjax_kernels.varying import alike, as_in


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything a compiled program depends on besides shapes."""

    family: Family
    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int


def check(*, normalizer: normalizers.Normalizer, **call) -> None:
    """Raises `NotImplementedError` for a normaliser without an online algorithm."""
    family_of(normalizer)


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
    block_q: int = 256,
    block_k: int = 512,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`flash.reference.attention` without a [T, S] array; block sizes trade memory for loop overhead.

    `bias` and `mask` are read tile by tile; the gradient of a bias has the bias's own shape.
    """
    B, T, N, _ = query.shape
    S, K = key.shape[1], key.shape[2]
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    family, factor = family_of(normalizer), None
    if normalizer_params:
        bias, factor = fold_params(normalizer, normalizer_params, bias)
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((N,), constant, accumulate)
    static = _Static(family, scale, logits_soft_cap, min(block_q, T), min(block_k, S))
    more_q, more_k = -T % static.block_q, -S % static.block_k
    group = (K, N // K)

    def tokens(x, more):  # [B, T, N, ...] -> [B, K, G, T, ...]
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(*x.shape[:2], *group, *x.shape[3:]), 1, 3)

    def square(x):  # [b, n, t, s] -> [b, k, g, t, s], each letter a size or 1
        if x is None:
            return None
        wide = [
            (0, more if size > 1 else 0)
            for size, more in zip(x.shape[2:], (more_q, more_k), strict=True)
        ]
        x = jnp.pad(x, [(0, 0), (0, 0), *wide])
        heads = (1, 1) if x.shape[1] == 1 else group
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(accumulate), (B, T, N))
        sinks = tokens(sinks, more_q)
    keys, values = (
        jnp.pad(x, [(0, 0), (0, more_k), (0, 0), (0, 0)]).swapaxes(1, 2) for x in (key, value)
    )
    operands = alike((
        tokens(query, more_q), keys, values, square(bias), square(mask),
        visibility.pad(more_q, more_k), sinks,
    ))  # fmt: skip
    results: Any = _blockwise(static, *operands)
    out, lse = results
    out = jnp.moveaxis(out[:, :, :, :T], 3, 1).reshape(B, T, N, value.shape[-1])
    if factor is not None:
        out = (out * factor).astype(query.dtype)
    if not normalizer.has_log_sum_exp:
        return out, None
    return out, jnp.moveaxis(lse[:, :, :, :T], 3, 1).reshape(B, T, N)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(static, query, key, value, bias, mask, visibility, sinks) -> tuple[Array, Array]:
    out, lse, _ = _forward(static, query, key, value, bias, mask, visibility, sinks)
    return out, lse


def _loop(start, stop, body, carry):
    """`fori_loop`, but a single turn is inlined: small problems compile to straight code."""
    return body(start, carry) if stop - start == 1 else jax.lax.fori_loop(start, stop, body, carry)


class _Tiles:
    """Cuts tiles out of the operands of one call; i and j count blocks of queries and keys."""

    def __init__(self, static, query, key, value, bias, mask, visibility):
        self.static, self.query, self.key, self.value = static, query, key, value
        self.bias, self.mask, self.visibility = bias, mask, visibility
        self.rows, self.columns = (
            query.shape[3] // static.block_q,
            key.shape[2] // static.block_k,
        )
        self.dtype = jnp.promote_types(query.dtype, jnp.float32)
        prunes = visibility.is_causal or visibility.has_window or visibility.key_lengths is not None
        prunes |= visibility.query_segment_ids is not None or visibility.query_lengths is not None
        single = self.rows == self.columns == 1
        self.table = (
            visibility.block_table(static.block_q, static.block_k)
            if prunes and not single
            else None
        )

    def where_visible(self, i, j, compute, carry):
        """Run `compute` on the carry unless the mask empties tile (i, j)."""
        if self.table is None:
            return compute(carry)
        return jax.lax.cond(self.table[i, j], compute, lambda same: same, carry)

    def queries(self, x, i):
        size = self.static.block_q
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=3)

    def keys(self, x, j):
        size = self.static.block_k
        return jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=2).astype(self.dtype)

    def square(self, x, i, j):
        if x.shape[3] > 1:
            x = self.queries(x, i)
        if x.shape[4] > 1:
            size = self.static.block_k
            x = jax.lax.dynamic_slice_in_dim(x, j * size, size, axis=4)
        return x

    def logits(self, i, j):
        """Logits of tile (i, j), who is visible, and the slope of the soft cap; [B, K, G, bq, bk]."""
        query = self.queries(self.query, i).astype(self.dtype)
        logits = jnp.einsum("BKGTH,BKSH->BKGTS", query, self.keys(self.key, j)) * self.static.scale
        slope = None
        if self.static.soft_cap is not None:
            squashed = jnp.tanh(logits / self.static.soft_cap)
            logits, slope = self.static.soft_cap * squashed, 1 - squashed**2
        if self.bias is not None:
            logits = logits + self.square(self.bias, i, j).astype(self.dtype)
        bq, bk = self.static.block_q, self.static.block_k
        where = self.visibility.visible(i * bq, bq, j * bk, bk)[:, :, None]
        if self.mask is not None:
            where = where & self.square(self.mask, i, j)
        return logits, jnp.broadcast_to(where, logits.shape), slope


def _forward(static, query, key, value, bias, mask, visibility, sinks):
    tiles = _Tiles(static, query, key, value, bias, mask, visibility)
    family, dtype = static.family, tiles.dtype
    B, K, G, _, _ = query.shape
    rows = (B, K, G, static.block_q)

    def row_block(i):
        sink = None if sinks is None else tiles.queries(sinks, i)

        def column_block(j, carry):
            def visit(carry):
                state, acc = carry
                logits, where, _ = tiles.logits(i, j)
                state, rescale, numerators = family.absorb(state, logits, where)
                gathered = jnp.einsum("BKGTS,BKSh->BKGTh", numerators, tiles.keys(value, j))
                return state, rescale[..., None] * acc + gathered

            return tiles.where_visible(i, j, visit, carry)

        acc = jnp.zeros((*rows, value.shape[-1]), dtype)
        begin = as_in((family.start(sink, rows, dtype), acc), (query, key, value))
        state, acc = _loop(0, tiles.columns, column_block, begin)
        denominator, inverse = family.finish(state)
        return (acc * inverse[..., None]).astype(query.dtype), denominator

    if tiles.rows == 1:
        out, denominator = row_block(0)
    else:
        out, denominator = jax.lax.map(
            row_block, jnp.arange(tiles.rows)
        )  # [blocks, B, K, G, bq, …]
        out, denominator = (
            jnp.moveaxis(x, 0, 3).reshape(B, K, G, -1, *x.shape[5:]) for x in (out, denominator)
        )
    out, denominator = saved((out, denominator))
    residuals = (query, key, value, bias, mask, visibility, sinks, out, denominator)
    return out, denominator, residuals


def _forward_rule(static, *operands):
    out, denominator, residuals = _forward(static, *operands)
    return (out, denominator), residuals


def _backward_rule(static, residuals, cotangents):
    query, key, value, bias, mask, visibility, sinks, out, denominator = residuals
    d_out, d_lse = cotangents
    tiles = _Tiles(static, query, key, value, bias, mask, visibility)
    family, dtype, bk = static.family, tiles.dtype, static.block_k
    d_out = d_out.astype(dtype)
    delta = (d_out * out.astype(dtype)).sum(-1) - d_lse  # D − dL, [B, K, G, T]

    def row_block(i, carry):
        rows_do, rows_delta = tiles.queries(d_out, i), tiles.queries(delta, i)
        rows_denominator = tiles.queries(denominator, i)
        rows_query = tiles.queries(query, i).astype(dtype)

        def column_block(j, carry):
            def visit(carry):
                dq, dk, dv, db = carry
                logits, where, slope = tiles.logits(i, j)
                weights = family.weights(logits, where, rows_denominator)
                dw = jnp.einsum("BKGTh,BKSh->BKGTS", rows_do, tiles.keys(value, j))
                dx = family.d_logits(logits, where, rows_denominator, weights, dw, rows_delta)
                dx = jnp.where(where, dx, 0)
                if db is not None:
                    db = _add_square(db, dx, i, j, static)
                if slope is not None:
                    dx = dx * slope
                dx = dx * static.scale
                dq = dq + jnp.einsum("BKGTS,BKSH->BKGTH", dx, tiles.keys(key, j))
                dk = _add_at(dk, jnp.einsum("BKGTS,BKGTH->BKSH", dx, rows_query), j * bk, 2)
                dv = _add_at(dv, jnp.einsum("BKGTS,BKGTh->BKSh", weights, rows_do), j * bk, 2)
                return dq, dk, dv, db

            return tiles.where_visible(i, j, visit, carry)

        dq, dk, dv, db = carry
        block = as_in(jnp.zeros((*dq.shape[:3], static.block_q, dq.shape[-1]), dtype), dq)
        block, dk, dv, db = _loop(0, tiles.columns, column_block, (block, dk, dv, db))
        return jax.lax.dynamic_update_slice_in_dim(dq, block, i * static.block_q, 3), dk, dv, db

    operands = (query, key, value, bias)
    zeros = tuple(None if x is None else jnp.zeros(x.shape, dtype) for x in operands)
    grads = _loop(0, tiles.rows, row_block, as_in(zeros, operands))
    dq, dk, dv, db = (
        None if x is None else x.astype(like.dtype) for x, like in zip(grads, operands, strict=True)
    )
    d_sinks = None
    if sinks is not None:
        share = jnp.where(denominator == -jnp.inf, 0, jnp.exp(sinks - denominator))
        d_sinks = (-share * delta).astype(sinks.dtype)
    return dq, dk, dv, db, None, None, d_sinks


def _add_at(total: Array, part: Array, start, axis: int) -> Array:
    size = part.shape[axis]
    old = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)


def _add_square(total: Array, part: Array, i, j, static) -> Array:
    """Add a tile to the gradient of a bias, summed over the dimensions that the bias broadcasts."""
    ones = [axis for axis, size in enumerate(total.shape) if size == 1 and part.shape[axis] > 1]
    part = part.sum(axis=ones, keepdims=True)
    starts = [0] * 5
    starts[3] = i * static.block_q if total.shape[3] > 1 else 0
    starts[4] = j * static.block_k if total.shape[4] > 1 else 0
    old = jax.lax.dynamic_slice(total, starts, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, starts)


_blockwise.defvjp(_forward_rule, _backward_rule)
