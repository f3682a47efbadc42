"""Block-sparse: the key blocks whose mean key the mean query likes best."""

import dataclasses

import jax.numpy as jnp

from sinkjax.ops.sparse.pattern import LEAST_BLOCKS, expect
from sinkjax.ops.sparse.prompt import Prompt
from sinkjax.ops.sparse.selection import Selection, cut


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    r"""The M key blocks j with the largest $\langle \bar q_i, \bar k_j \rangle$ for each query block i.

    Args:
        num_blocks: M, with the forced ones.
        block_size: tokens per block.

    Source: Jiang et al. 2024 (MInference), arXiv 2407.02490, with 100 blocks of 64; that the first
    block and the diagonal are in whatever their scores is ours.
    """

    num_blocks: int = 100
    block_size: int = 64

    def __post_init__(self) -> None:
        expect(self, "num_blocks", LEAST_BLOCKS)
        expect(self, "block_size", 1)

    def choose(self, prompt: Prompt) -> Selection:
        scores = prompt.pooled_logits(prompt.pooled_query)
        candidates = prompt.candidates[:, None]
        blocks, _ = cut(scores, candidates, prompt.forced, self.num_blocks)
        # A fixed number is what the pattern asks for: nothing is cut short.
        B, N, _, _ = prompt.sizes
        return Selection(blocks, jnp.zeros((B, N), jnp.int32), block_size=self.block_size)
