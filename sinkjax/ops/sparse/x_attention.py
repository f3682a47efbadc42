"""XAttention: sums along the anti-diagonals of a block say how much attention it holds."""

import dataclasses

import jax
import jax.numpy as jnp

from sinkjax.ops.sparse.pattern import LEAST_BLOCKS, expect
from sinkjax.ops.sparse.prompt import Prompt
from sinkjax.ops.sparse.selection import Selection, cover, cut

_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class XAttention:
    r"""As few key blocks per query block as hold a share τ of the weight of their anti-diagonals.

    Queries and keys are taken in groups of s tokens, the queries of a group in reverse: the products
    of two groups, $x_{gh} = \sum_r q_{g,s-1-r} k_{h,r}$, sum an anti-diagonal of an s × s tile, which
    every column and every diagonal of the tile crosses. Their softmax over h at scale/s, summed per
    block, is the estimate; a group of keys is visible that begins no later than the group of queries
    ends.

    Args:
        threshold: τ, the share to cover, the forced blocks counted first.
        stride: s; divides the block size.
        num_blocks: the most key blocks for one block of queries; past it those with the least
            estimated weight go and `Selection.truncated` counts them.
        block_size: tokens per block.

    Source: Xu et al. 2025 (XAttention), arXiv 2503.16428; constants as in `microsoft/MInference`,
    `xattention.py`, whose estimates these are. Its cover forgets to force block 0 where the prompt is
    one chunk, and then keeps one block more than the share needs. The bound `num_blocks` is ours.
    """

    threshold: float = 0.9
    stride: int = 8
    num_blocks: int = 64
    block_size: int = 128

    def __post_init__(self) -> None:
        expect(self, "threshold", 0, 1)
        expect(self, "stride", 1)
        expect(self, "num_blocks", LEAST_BLOCKS)
        expect(self, "block_size", 1)
        if self.block_size % self.stride:
            raise ValueError(
                f"XAttention.stride: expected a divisor of block_size={self.block_size}, "
                f"got {self.stride}"
            )

    def choose(self, prompt: Prompt) -> Selection:
        mass = self._mass(prompt)
        candidates = prompt.candidates[:, None]
        wanted = cover(mass, self.threshold, prompt.forced[:, None]) & candidates
        blocks, truncated = cut(mass, wanted, prompt.forced, self.num_blocks)
        return Selection(blocks, truncated, block_size=self.block_size)

    def _mass(self, prompt: Prompt):
        """[B, N, Q, J], one block of queries after the other."""
        B, N, Q, J = prompt.sizes
        s, per_block = self.stride, self.block_size // self.stride
        K, H = prompt.key.shape[1], prompt.key.shape[-1]
        dtype = jnp.promote_types(prompt.query.dtype, jnp.float32)
        seen = prompt.query_positions >= 0
        query = jnp.where(seen[..., None, None], prompt.query, 0)
        query = query.reshape(B, Q, per_block, s, K, N // K, H)[:, :, :, ::-1]
        ends = prompt.query_positions.reshape(B, Q, per_block, s).max(axis=-1)
        key = jnp.where(prompt.exists[:, None, :, None], prompt.key, 0)
        key = key.reshape(B, K, J * per_block, s, H)
        begins = jnp.arange(J * per_block, dtype=jnp.int32) * s
        holds = prompt.exists.reshape(B, -1, s).any(axis=-1)

        def row(operands):
            queries, end = operands  # [B, groups, s, K, G, H], [B, groups]
            products = jnp.einsum(
                "BgsKGH,BKhsH->BKGgh", queries, key, precision=_EXACT, preferred_element_type=dtype
            )
            logits = prompt.logits(products / s)
            where = holds[:, None, :] & (begins <= end[:, :, None])
            logits = jnp.where(where[:, None, None], logits, -jnp.inf)
            top = logits.max(axis=-1, keepdims=True)
            terms = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
            total = terms.sum(axis=-1, keepdims=True)
            weights = (terms / jnp.where(total == 0, 1, total)).sum(axis=3)
            return weights.reshape(B, N, J, per_block).sum(axis=-1)

        mass = jax.lax.map(row, (query.swapaxes(0, 1), ends.swapaxes(0, 1)))
        return jnp.moveaxis(mass, 0, 2)
