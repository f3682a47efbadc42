"""What a pattern chooses: key blocks for each block of queries, in an array of a size known ahead."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "truncated", "columns"],
    meta_fields=["block_size", "window", "num_sink_tokens", "num_dense_queries"],
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """The pairs of one call that are computed. A pair is chosen when its key lies in a chosen block
    and inside the mask, when its key is a chosen column, or when its query is one of the last that
    see everything; causality comes on top of it all.

    Args:
        blocks: int32 `[B, N, Q, M]` of Q blocks of queries: key blocks in ascending order, −1 is empty.
        truncated: int32 `[B, N]`, how many blocks the pattern wanted and M had no room for.
        columns: int32 `[B, N, V]`, slots of keys that every later query sees, −1 is empty; or None.
        block_size: tokens per block, of queries and of keys.
        window, num_sink_tokens: a mask by position within the chosen blocks, as in
            `ops.decode_attention`; None is all of the block.
        num_dense_queries: so many last queries of each row see every key.
    """

    # `Any` in pytrees: their leaves are not always arrays.
    blocks: Any
    truncated: Any
    columns: Any = None
    block_size: int = 64
    window: int | None = None
    num_sink_tokens: int = 0
    num_dense_queries: int = 0

    @property
    def counts(self) -> Int[Array, "B N Q"]:
        """Key blocks that each block of queries reads."""
        return (self.blocks >= 0).sum(axis=-1)


def cut(
    scores: Float[Array, "B N Q J"],
    wanted: Bool[Array, "B #N Q J"],
    forced: Bool[Array, "B Q J"],
    num_blocks: int,
) -> tuple[Int[Array, "B N Q M"], Int[Array, "B N"]]:
    """The forced blocks, then those wanted in the order of their scores, until the budget is full.

    Args:
        scores: higher is kept; a score that is no number is the lowest.
        wanted: what the pattern asks for.
        forced: in before anything else.
        num_blocks: the budget; M is this or the number J of all blocks.

    Returns:
        `Selection.blocks` and `Selection.truncated`. Ties go to the earlier block.
    """
    J = scores.shape[-1]
    limits = jnp.finfo(scores.dtype)
    finite = jnp.where(jnp.isnan(scores), limits.min, jnp.clip(scores, limits.min, limits.max))
    wanted = jnp.broadcast_to(wanted | forced[:, None], scores.shape)
    rank = jnp.where(forced[:, None], jnp.inf, jnp.where(wanted, finite, -jnp.inf))
    top, index = jax.lax.top_k(rank, min(num_blocks, J))
    chosen = top > -jnp.inf
    truncated = wanted.sum(axis=(2, 3)) - chosen.sum(axis=(2, 3))
    return ascending(index, chosen, J), truncated.astype(jnp.int32)


def ascending(
    index: Int[Array, "*rows M"], chosen: Bool[Array, "*#rows M"], size: int
) -> Int[Array, "*rows M"]:
    """The chosen indices below `size` in ascending order, then −1."""
    ordered = jnp.sort(jnp.where(chosen, index, size), axis=-1)
    return jnp.where(ordered < size, ordered, -1).astype(jnp.int32)


def cover(
    mass: Float[Array, "*rows n"],
    share: float,
    first: Bool[Array, "*#rows n"],
    least: int = 0,
) -> Bool[Array, "*rows n"]:
    """The fewest entries that hold `share` of the sum of a row, where `first` are in anyway.

    Entries are added in descending order, those of equal mass in ascending order of index, up to and
    including the one that reaches the share, and not fewer than `least` with the first. Beyond that
    number an entry without mass is never added.
    """
    first = jnp.broadcast_to(first, mass.shape)
    order = jnp.argsort(jnp.where(first, -jnp.inf, -mass), axis=-1, stable=True)
    ordered = jnp.take_along_axis(mass, order, axis=-1)
    before = ordered.cumsum(axis=-1) - ordered
    kept = (before < share * mass.sum(axis=-1, keepdims=True)) & (ordered > 0)
    kept |= jnp.arange(mass.shape[-1]) < least
    back = jnp.zeros_like(kept)
    return first | jnp.put_along_axis(back, order, kept, axis=-1, inplace=False)
