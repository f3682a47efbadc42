"""Vertical-slash: some keys for every query, and some distances for every query."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops.sparse.last_queries import column_and_diagonal_sums, last_queries
from sinkjax.ops.sparse.pattern import LEAST_BLOCKS, expect
from sinkjax.ops.sparse.prompt import Prompt
from sinkjax.ops.sparse.selection import Selection, cut


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """The keys and the distances that the last queries give most weight to.

    Of the softmax of the last `num_queries` queries, sums over queries say which keys (columns) and
    sums along diagonals which distances matter; the best of each are kept for all queries. Columns
    are exact; a distance is computed in whole blocks, all that it touches: a superset, as in the
    authors' kernel.

    Args:
        num_columns: keys kept, the first `forced_columns` of the text among them.
        num_diagonals: distances kept, those below `forced_diagonals` among them.
        num_queries: last queries that choose.
        num_blocks: the most key blocks that the distances may touch for one block of queries.
            Past it those with less weight go and `Selection.truncated` counts them.
        block_size: tokens per block.

    Source: Jiang et al. 2024 (MInference), arXiv 2407.02490; counts as in `microsoft/MInference`,
    `minference_forward.py`. The bound `num_blocks` is ours: 6096 adjacent distances touch 97 blocks.
    """

    num_columns: int = 1000
    num_diagonals: int = 6096
    num_queries: int = 64
    forced_columns: int = 30
    forced_diagonals: int = 100
    num_blocks: int = 128
    block_size: int = 64

    def __post_init__(self) -> None:
        expect(self, "forced_columns", 1)
        expect(self, "forced_diagonals", 1)
        expect(self, "num_columns", self.forced_columns)
        expect(self, "num_diagonals", self.forced_diagonals)
        expect(self, "num_blocks", LEAST_BLOCKS)
        expect(self, "num_queries", 1)
        expect(self, "block_size", 1)

    def choose(self, prompt: Prompt) -> Selection:
        columns, diagonals = column_and_diagonal_sums(
            prompt, *last_queries(prompt, self.num_queries)
        )
        index = jnp.arange(columns.shape[-1], dtype=jnp.int32)
        in_text = (index <= prompt.newest[:, None])[:, None]
        held = in_text & prompt.exists[:, None]
        slots = _best(columns, index < self.forced_columns, held, self.num_columns)
        kept = _best(diagonals, index < self.forced_diagonals, in_text, self.num_diagonals)
        wanted, weight = touched(prompt, _marked(kept, len(index)), diagonals)
        # What a forced distance touches goes before the rest, whose sums cannot pass num_queries.
        first, block = prompt.span[0], jnp.arange(prompt.sizes[3], dtype=jnp.int32)
        near = first[:, :, None] - (block + 1) * self.block_size + 1 < self.forced_diagonals
        weight = weight + jnp.where(near, self.num_queries, 0)[:, None].astype(weight.dtype)
        blocks, truncated = cut(weight, wanted, prompt.forced, self.num_blocks)
        return Selection(blocks, truncated, slots, block_size=self.block_size)


def touched(
    prompt: Prompt, kept: Bool[Array, "B N S"], weight: Float[Array, "B N S"]
) -> tuple[Bool[Array, "B N Q J"], Float[Array, "B N Q J"]]:
    """Blocks that hold a pair at a kept distance, and the weight of the kept distances in each.

    Block i of the queries is at a run of distances from block j of the keys: two lookups in running
    sums over distances.
    """
    (first, last), b, S = prompt.span, prompt.block_size, kept.shape[-1]
    B, N, Q, J = prompt.sizes
    begin = jnp.arange(J, dtype=jnp.int32) * b
    stop = jnp.clip(last[:, :, None] - begin + 1, 0, S)
    start = jnp.clip(first[:, :, None] - begin - b + 1, 0, stop)

    each = jnp.stack([kept.astype(weight.dtype), jnp.where(kept, weight, 0)])
    sums = jnp.pad(each.cumsum(axis=-1), [(0, 0), (0, 0), (0, 0), (1, 0)])
    at_start, at_stop = (
        jnp.take_along_axis(sums, jnp.broadcast_to(x.reshape(1, B, 1, -1), (2, B, N, Q * J)), -1)
        for x in (start, stop)
    )
    count, total = (at_stop - at_start).reshape(2, B, N, Q, J)
    return (count > 0) & prompt.candidates[:, None], total


def _best(sums, forced, where, count: int) -> Int[Array, "B N m"]:
    """The `count` largest, the forced ones first; −1 where there are fewer."""
    rank = jnp.where(where, jnp.where(forced, jnp.inf, sums), -jnp.inf)
    top, index = jax.lax.top_k(rank, min(count, sums.shape[-1]))
    return jnp.where(top > -jnp.inf, index, -1).astype(jnp.int32)


def _marked(index: Int[Array, "B N m"], size: int) -> Bool[Array, "B N size"]:
    """True at the indices; −1 marks nothing."""
    B, N, _ = index.shape
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(N)[:, None]
    empty = jnp.zeros((B, N, size), bool)
    return empty.at[rows, heads, jnp.where(index < 0, size, index)].set(True, mode="drop")
