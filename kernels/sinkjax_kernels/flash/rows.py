"""Attention with any normaliser, in memory linear in S: the specification, a block of rows at a time.

What has no online algorithm (`families`) needs whole rows of logits. A block of queries keeps
`[B, N, block_q, S]` of them, and the backward pass makes them anew (`jax.checkpoint`), so that
nothing of the size of T times S is ever held.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash import reference
from sinkjax_kernels.masks import Visibility


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
    block_q: int = 128,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    """`flash.reference.attention`, holding `[B, N, block_q, S]` at a time."""
    T = query.shape[1]
    static = {
        "normalizer": normalizer,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "normalizer_params": normalizer_params,
    }
    if T <= block_q:
        return reference.attention(query, key, value, bias, mask, visibility, sinks, **static)
    blocks, more = -(-T // block_q), -T % block_q
    visibility = visibility.pad(more, 0)

    # Operands with an axis of queries are scanned over: the gradient of each is written once, where
    # that of a slice of a whole would be added to the whole for every block.
    axes = {"query": 1, "bias": 2, "mask": 2, "sinks": 1}
    whole = {"query": query, "bias": bias, "mask": mask, "sinks": sinks}
    cut = {}
    for name, axis in axes.items():
        x = whole[name]
        if x is None or x.ndim <= axis or x.shape[axis] == 1:
            continue
        x = jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], blocks, block_q, *x.shape[axis + 1 :])
        cut[name] = jnp.moveaxis(x, axis, 0)

    @partial(jax.checkpoint, prevent_cse=False)  # a loop keeps the two passes apart
    def some_rows(block):
        i, parts = block
        parts = whole | parts
        return reference.attention(
            parts["query"],
            key,
            value,
            parts["bias"],
            parts["mask"],
            visibility.rows(i * block_q, block_q),
            parts["sinks"],
            **static,
        )

    results = jax.lax.map(some_rows, (jnp.arange(blocks), cut))  # [blocks, B, block_q, …]

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]

    return jax.tree.map(join, results)
