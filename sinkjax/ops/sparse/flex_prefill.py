"""FlexPrefill: each head chooses between query-aware blocks and vertical-slash, and how many."""

import dataclasses

import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from sinkjax.ops.sparse.last_queries import column_and_diagonal_sums, last_queries
from sinkjax.ops.sparse.pattern import LEAST_BLOCKS, expect
from sinkjax.ops.sparse.prompt import Prompt, block_means
from sinkjax.ops.sparse.selection import Selection, cover, cut


@dataclasses.dataclass(frozen=True)
class FlexPrefill:
    r"""As few blocks as hold a share γ of the weight, estimated in one of two ways per head.

    With $\hat p$ the softmax of the mean of the last b queries with the mean keys of all blocks and
    p their true attention summed per block: a head with $\sqrt{JSD(\hat p \| p)} < \tau$ trusts the
    means ("query-aware": the softmax of mean queries and mean keys of all pairs of blocks, covered
    to γ as one distribution); any other takes block columns and block diagonals of the true
    attention of the last b queries, each covered to γ.

    Args:
        gamma: γ, the share to cover.
        tau: τ; 0 makes every head vertical-slash.
        min_blocks: least number of block columns, and of block diagonals.
        num_blocks: the most key blocks for one block of queries; past it those with the least
            estimated weight go and `Selection.truncated` counts them.
        block_size: tokens per block, b.

    Source: Lai et al. 2025 (FlexPrefill), OpenReview OfjIlbelrT; constants as in
    `microsoft/MInference`, `flexprefill.py`. Columns and diagonals are counted in blocks here, not in
    tokens; the entry that reaches γ is kept, as in the paper; the bound `num_blocks` is ours.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_blocks: int = 1
    num_blocks: int = 64
    block_size: int = 128

    def __post_init__(self) -> None:
        expect(self, "gamma", 0, 1)
        expect(self, "tau", 0, 1)
        expect(self, "min_blocks", 1)
        expect(self, "num_blocks", LEAST_BLOCKS)
        expect(self, "block_size", 1)

    def choose(self, prompt: Prompt) -> Selection:
        query, positions = last_queries(prompt, self.block_size)
        count = jnp.maximum((positions >= 0).sum(axis=1), 1)[:, None, None]
        columns, diagonals = (
            x.reshape(*x.shape[:2], -1, self.block_size).sum(axis=-1) / count
            for x in column_and_diagonal_sums(prompt, query, positions)
        )
        seen = (positions >= 0)[:, None]
        mean = block_means(query.swapaxes(1, 2), seen, query.shape[1])
        in_text = prompt.candidates.any(axis=1)[:, None]
        estimate = _softmax(prompt.pooled_logits(mean)[:, :, 0], in_text)
        aware = root_js_divergence(estimate, columns) < self.tau

        by_blocks, probability = self._query_aware(prompt)
        by_lines, weight = self._vertical_slash(prompt, columns, diagonals)
        pick = aware[..., None, None]
        blocks, truncated = cut(
            jnp.where(pick, probability, weight),
            jnp.where(pick, by_blocks, by_lines),
            prompt.forced,
            self.num_blocks,
        )
        return Selection(blocks, truncated, block_size=self.block_size)

    def _query_aware(self, prompt: Prompt):
        """One distribution over all pairs of blocks, each row of queries with the same share of it."""
        B, N, Q, J = prompt.sizes
        candidates = prompt.candidates[:, None]
        probability = _softmax(prompt.pooled_logits(prompt.pooled_query), candidates)
        flat = probability.reshape(B, N, Q * J)
        kept = cover(flat, self.gamma, prompt.forced.reshape(B, 1, Q * J))
        return kept.reshape(B, N, Q, J) & candidates, probability

    def _vertical_slash(self, prompt: Prompt, columns, diagonals):
        """Block j when column j is kept, or the diagonal i − j blocks back."""
        B, N, Q, J = prompt.sizes
        block = jnp.arange(J, dtype=jnp.int32)
        back = prompt.span[1][:, :, None] // self.block_size - block
        index = jnp.broadcast_to(jnp.maximum(back, 0).reshape(B, 1, Q * J), (B, N, Q * J))

        def on_diagonal(x):
            found = jnp.take_along_axis(x, index, axis=-1).reshape(B, N, Q, J)
            return jnp.where((back >= 0)[:, None], found, jnp.zeros((), x.dtype))

        lines = jnp.stack([columns, diagonals])
        kept = cover(lines, self.gamma, block == 0, self.min_blocks)
        lines = jnp.where(kept, lines, 0)
        wanted = kept[0][:, :, None] | on_diagonal(kept[1])
        weight = lines[0][:, :, None] + on_diagonal(lines[1])
        return wanted & prompt.candidates[:, None], weight


def root_js_divergence(
    p: Float[Array, "*rows n"], q: Float[Array, "*rows n"]
) -> Float[Array, "*rows"]:
    r"""$\sqrt{	frac12 KL(p \| m) + 	frac12 KL(q \| m)}$ with m = (p + q)/2, in nats: 0 to 0.83."""
    middle = (p + q) / 2
    safe = jnp.where(middle > 0, middle, 1)
    total = (xlogy(p, p / safe) + xlogy(q, q / safe)).sum(axis=-1) / 2
    return jnp.sqrt(jnp.maximum(total, 0))


def _softmax(logits, where):
    """Softmax over the blocks that are there; 0 for a row with none."""
    top = jnp.max(logits, axis=-1, keepdims=True, where=where, initial=-jnp.inf)
    terms = jnp.where(where, jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = terms.sum(axis=-1, keepdims=True)
    return terms / jnp.where(total == 0, 1, total)
