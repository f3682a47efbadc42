"""Attention on the pairs of a `Selection`: keys are gathered in blocks, nothing else is computed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.ops.attention import check_params, dot_product_attention
from sinkjax.ops.sparse.prompt import Prompt, to_blocks
from sinkjax.ops.sparse.selection import Selection
from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import Normalizer

_EXACT = jax.lax.Precision.HIGHEST


def sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S h"],
    selection: Selection,
    *,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: str | Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
) -> Float[Array, "B T N h"] | tuple[Float[Array, "B T N h"], Float[Array, "B T N"] | None]:
    r"""$o_t = \sum_j w_{tj} v_j$ over the keys j ≤ t that the selection leaves, exactly.

    Equal to dense attention under the selection as a mask, for every normaliser, in time and memory
    that grow with the chosen blocks: a loop over blocks of queries, each of which gathers its M key
    blocks per head. Plain XLA: it pays where M is much less than the number of blocks.

    Args:
        query, key, value: rotated; keys and values as they lie in a cache, slot s at position s.
        selection: of `select`, for the same queries and keys.
        query_positions, key_positions: as given to `select`.
        bias: added to the logits after scale and soft cap; S counts slots.
        sinks: sink logits per query head, or per token and head; only with softmax.
        normalizer, normalizer_params: as in `dot_product_attention`; a normaliser that counts keys
            counts the chosen ones.
        scale, logits_soft_cap: of the logits; the scale is 1/√H by default.
        return_residual: also return the log-sum-exp, sink included, None where there is none.

    Returns:
        the output in the query's dtype, 0 for a row that sees nothing; with `return_residual` also
        the log-sum-exp, float32 at least.

    Raises:
        ValueError: a selection for other shapes, or options that do not fit.

    Source: the block index lists of Jiang et al. 2024 (MInference), arXiv 2407.02490, §3.
    """
    B, T, N, _ = query.shape
    S, b = key.shape[2], selection.block_size
    described = normalizers.resolve(normalizer)
    params = check_params(described, normalizer_params, N)
    if sinks is not None and not described.takes_sinks:
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {described}")
    if sinks is not None and sinks.shape not in ((N,), (B, T, N)):
        raise ValueError(f"sinks: expected [N]={(N,)} or [B, T, N]={(B, T, N)}, got {sinks.shape}")
    if return_residual and not described.has_log_sum_exp:
        raise ValueError(f"return_residual: normalizer {described} has no log-sum-exp")
    if selection.blocks.shape[:3] != (B, N, -(-T // b)):
        raise ValueError(
            f"selection: expected blocks for [B, N, T/{b}] = {[B, N, -(-T // b)]}, "
            f"got {list(selection.blocks.shape[:3])}"
        )
    prompt = to_blocks(
        normalizers.feature_map(described, query), normalizers.feature_map(described, key),
        query_positions, key_positions, scale, logits_soft_cap, b,
    )  # fmt: skip
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, (B, T, N))
    found: Any = _on_chosen_pairs(prompt, value, selection, bias, sinks, described, params)
    out: Any = found[0][:, :T]
    lse: Any = None if found[1] is None else found[1][:, :T]
    if selection.num_dense_queries > 0:
        positions = prompt.query_positions[:, :T]
        last = jnp.argsort(positions, axis=1)[:, -selection.num_dense_queries :]
        rows = jnp.arange(B)[:, None]
        slots = jnp.where(prompt.exists[:, :S], jnp.arange(S, dtype=jnp.int32), -1)
        if bias is not None and bias.shape[2] > 1:
            bias = jnp.take_along_axis(bias, last[:, None, :, None], axis=2)
        results: Any = dot_product_attention(
            query[rows, last],
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            bias,
            is_causal=True,
            query_positions=positions[rows, last],
            key_positions=slots,
            sinks=None if sinks is None else sinks[rows, last],
            normalizer=described,
            normalizer_params=normalizer_params,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            return_residual=lse is not None,
        )
        dense, dense_lse = results if lse is not None else (results, None)
        out = out.at[rows, last].set(dense.astype(out.dtype))
        lse = None if lse is None else lse.at[rows, last].set(dense_lse)
    out = out.astype(query.dtype)
    return (out, lse) if return_residual else out


def _on_chosen_pairs(prompt: Prompt, value, selection: Selection, bias, sinks, normalizer, params):
    """Output and log-sum-exp of all queries, one block of queries after the other."""
    B, N, Q, J = prompt.sizes
    b, S = prompt.block_size, value.shape[2]
    dtype = jnp.promote_types(prompt.query.dtype, jnp.float32)
    value = jnp.pad(value, [(0, 0), (0, 0), (0, J * b - S), (0, 0)])
    params = {name: leaf.reshape(N, 1, 1) for name, leaf in params.items()}
    queries = (prompt.query, prompt.query_positions, sinks)
    queries = (_blocks_of_queries(x, 1, Q, b) for x in queries)
    biases = None if bias is None or bias.shape[2] == 1 else _blocks_of_queries(bias, 2, Q, b)
    everywhere = bias if biases is None else None

    def block(operands):
        query, positions, sinks, bias, index = operands
        key, values, slot = _gathered(prompt, value, selection, index)
        products = jnp.einsum(
            "BTNH,BNSH->BNTS", query, key, precision=_EXACT, preferred_element_type=dtype
        )
        logits = prompt.logits(products)
        bias = everywhere if bias is None else bias
        if bias is not None:
            logits = logits + _at_slots(bias, slot).astype(dtype)
        weights, lse = normalizers.weights(
            normalizer,
            logits,
            _visible(prompt, selection, positions, slot, normalizer.excludes_self),
            sinks=None if sinks is None else sinks.swapaxes(1, 2),
            params=params,
            key_order=slot[:, :, None],
        )
        out = jnp.einsum(
            "BNTS,BNSh->BTNh",
            weights,
            values.astype(weights.dtype),
            precision=_EXACT,
            preferred_element_type=dtype,
        )
        return out, None if lse is None else lse.swapaxes(1, 2)

    results = jax.lax.map(block, (*queries, biases, jnp.moveaxis(selection.blocks, 2, 0)))
    return tuple(
        None if x is None else x.swapaxes(0, 1).reshape(B, Q * b, *x.shape[3:]) for x in results
    )


def _blocks_of_queries(x, axis: int, number: int, size: int):
    """Queries along `axis` as a first axis of blocks, padded with zeros."""
    if x is None:
        return None
    wide = [(0, 0)] * x.ndim
    wide[axis] = (0, number * size - x.shape[axis])
    x = jnp.pad(x, wide)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], number, size, *x.shape[axis + 1 :]), axis, 0)


def _gathered(prompt: Prompt, value, selection: Selection, index: Int[Array, "B N M"]):
    """Keys, values and slots of the blocks and columns; −1 is the slot of what is not there."""
    B, N, _, J = prompt.sizes
    b, K = prompt.block_size, value.shape[1]
    slot = jnp.maximum(index, 0)[..., None] * b + jnp.arange(b, dtype=jnp.int32)
    slot = jnp.where(index[..., None] >= 0, slot, -1).reshape(B, N, -1)

    def taken(leaf, indices):
        """[B, K, n, s, H] at [B, N, m]: the m of each head of a group side by side."""
        grouped = jnp.maximum(indices, 0).reshape(B, K, -1, 1, 1)
        return jnp.take_along_axis(leaf, grouped, axis=2).reshape(B, N, -1, leaf.shape[-1])

    leaves = [taken(x.reshape(B, K, J, b, -1), index) for x in (prompt.key, value)]
    if selection.columns is not None:
        columns = selection.columns
        # A column that lies in a chosen block is there already.
        again = (columns[..., None] // b == index[..., None, :]).any(axis=-1)
        slot = jnp.concatenate([slot, jnp.where(again, -1, columns)], axis=-1)
        for i, x in enumerate((prompt.key, value)):
            leaves[i] = jnp.concatenate([leaves[i], taken(x[:, :, :, None], columns)], axis=2)
    there = prompt.exists[jnp.arange(B)[:, None, None], jnp.maximum(slot, 0)]
    return *leaves, jnp.where(there, slot, -1)


def _visible(prompt: Prompt, selection: Selection, positions, slot, excludes_self: bool):
    """[B, N, b, m]: keys that are there and not later, inside the mask of the selection."""
    query, key = positions[:, None, :, None], slot[:, :, None, :]
    seen = (key >= 0) & ((key < query) if excludes_self else (key <= query))
    if selection.window is not None:
        seen &= (query - key < selection.window) | (key < selection.num_sink_tokens)
    return seen


def _at_slots(bias: Float[Array, "#B #N t #S"], slot: Int[Array, "B N m"]) -> Array:
    """The bias of the gathered keys, broadcastable to [B, N, t, m]."""
    if bias.shape[3] == 1:
        return bias
    rows = jnp.arange(bias.shape[0])[:, None, None]
    heads = jnp.arange(bias.shape[1])[:, None]
    return bias[rows, heads, :, jnp.maximum(slot, 0)].swapaxes(2, 3)
