"""Logit biases that are functions of the distance between a query and a key.

They take arbitrary integer distances, so that a cache may measure them as it likes: the distance to
a sink token that stays while the stream goes on is capped, for instance.
"""

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sinkjax import sharding
from sinkjax_kernels import masks


def index_within_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of every token in its own segment, `sinkjax_kernels.masks`, on any mesh."""
    layout = PartitionSpec(sharding.ROWS, "sequence")
    return sharding.laid_out_by_compiler(masks.index_within_segment, layout, segment_ids)


def distances(
    query_positions: Int[Array, "#B T"], key_positions: Int[Array, "#B S"] | Int[Array, "#B N S"]
) -> Int[Array, "#B #N T S"]:
    """Position of the query minus position of the key, which may differ from head to head."""
    if key_positions.ndim == 2:
        key_positions = key_positions[:, None]
    return query_positions[:, None, :, None] - key_positions[:, :, None, :]


def alibi_slopes(num_heads: int, *, balanced: bool = False) -> Float[Array, " N"]:
    r"""$2^{-8 (n + 1) / N}$ for head n: a geometric sequence from near-sighted to far-sighted heads.

    For every N, also where it is no power of two (the authors' code mixes two sequences there; the
    paper does not). `balanced` gives the first half of the heads the sequence for N/2 heads and the
    second half the same with the opposite sign, so that those favour what is far: of what the
    paper says (slopes of $\pm 2^{-k}$, k = 1 … N/2) this is the reading that equals it at N = 16.

    Source: Press et al. 2021, arXiv 2108.12409; balanced: Fu et al. 2025 (SWAT), arXiv
    2502.18845.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    near = (num_heads + 1) // 2 if balanced else num_heads
    slopes = 2.0 ** (-8 * np.arange(1, near + 1) / near)
    return jnp.asarray(np.concatenate([slopes, -slopes[: num_heads - near]]))


def alibi_bias(
    distance: Int[Array, "#B #N T S"], slopes: Float[Array, " N"]
) -> Float[Array, "#B N T S"]:
    r"""$-m_n |d|$: the further, the less.

    As large as the logits, and right for every normaliser. A causal layer whose normaliser is an
    exp-sum has the same in memory linear in S: `decay_bias(alibi_decay(positions, slopes))`.

    Args:
        distance: in tokens, of either sign.
        slopes: m, of `alibi_slopes` or learned.

    Returns:
        `[#B, N, T, S]`, to be added after scale and soft cap.

    Source: Press et al. 2021, arXiv 2108.12409.
    """
    return -slopes[:, None, None] * jnp.abs(distance).astype(slopes.dtype)


def alibi_decay(
    positions: Int[Array, "#B T"], slopes: Float[Array, " N"]
) -> Float[Array, "#B T N"]:
    r"""$F_t = -m_n t$: ALiBi as forgetting with a constant gate, for `decay_bias`.

    Since $F_t - F_j = -m_n (t - j)$ for every key that a causal layer shows. Padding (−1) counts as
    position 0. `B` is 1 where all rows agree; the `shift` of `join_sinks` needs every row. In float32
    the last bit of m t is the error of the logits.
    """
    return -slopes * jnp.maximum(positions, 0)[..., None].astype(slopes.dtype)


def learned_distance_bias(
    distance: Int[Array, "#B #N T S"], table: Float[Array, "N R"]
) -> Float[Array, "#B N T S"]:
    r"""$\beta_{n,|d|}$ for distances below R, 0 beyond.

    Args:
        distance: in tokens, of either sign.
        table: β, one number per head and distance; zeros at the start of training.

    Returns:
        `[#B, N, T, S]` in the dtype of the table, to be added after scale and soft cap.

    Source: Fu et al. 2026 (Lazy Attention), arXiv 2601.00919, with R = 512.
    """
    N, R = table.shape
    d = jnp.abs(distance)
    if d.shape[1] > 1:  # every head at distances of its own
        index = jnp.arange(N)[:, None, None] * R + jnp.minimum(d, R - 1)
        return jnp.where(d < R, sharding.take_rows(table.reshape(-1), index, mode="clip"), 0)
    d = d[:, 0]
    rows = sharding.take_rows(table.T, jnp.minimum(d, R - 1), mode="clip")
    return jnp.moveaxis(jnp.where((d < R)[..., None], rows, 0), -1, 1)
