"""A-shape and tri-shape: which pairs are computed is known before the prompt."""

import dataclasses

import jax.numpy as jnp

from sinkjax.ops.sparse.pattern import expect
from sinkjax.ops.sparse.prompt import Prompt
from sinkjax.ops.sparse.selection import Selection, ascending


@dataclasses.dataclass(frozen=True)
class AShape:
    """The first P keys and the last W of each query: $j < P$ or $t - j < W$, exactly.

    What streaming does, at prefill: cost is linear in the length of the prompt.

    Args:
        num_sink_tokens: P, at least 1.
        window: W, in keys, the query's own included.
        block_size: tokens per block.

    Source: `microsoft/MInference`, with 128 + 3968 as its default ("A-shape"; Λ-shape in LM-Infinite,
    arXiv 2308.16137).
    """

    num_sink_tokens: int = 128
    window: int = 3968
    block_size: int = 64

    def __post_init__(self) -> None:
        for name in ("num_sink_tokens", "window", "block_size"):
            expect(self, name, 1)

    def choose(self, prompt: Prompt) -> Selection:
        B, N, Q, J = prompt.sizes
        b = self.block_size
        first, last = (x[:, :, None] for x in prompt.span)
        sinks = -(-self.num_sink_tokens // b)
        # Blocks that a run of W + b − 1 tokens can touch wherever it begins.
        near = (self.window + 2 * b - 3) // b + 1
        begin = jnp.maximum((first - self.window + 1) // b, sinks)
        if sinks + near < J:
            index = jnp.arange(sinks + near, dtype=jnp.int32)
            index = jnp.where(index < sinks, index, begin + index - sinks)
        else:
            index = jnp.arange(J, dtype=jnp.int32)
        chosen = (index <= last // b) & (last >= 0) & ((index < sinks) | (index >= begin))
        index = jnp.broadcast_to(index, chosen.shape)
        blocks = ascending(index, chosen, J)[:, None]
        return Selection(
            jnp.broadcast_to(blocks, (B, N, *blocks.shape[2:])),
            jnp.zeros((B, N), jnp.int32),
            block_size=b,
            window=self.window,
            num_sink_tokens=self.num_sink_tokens,
        )


@dataclasses.dataclass(frozen=True)
class TriShape:
    """A-shape, and the last n queries of each row see every key.

    The last queries are the question: they may look anywhere, at a cost linear in the length. In a
    prompt that comes in chunks these are the last n of every chunk.

    Args:
        num_sink_tokens, window, block_size: see `AShape`.
        num_dense_queries: n.

    Source: `microsoft/MInference`, with 128 + 3968 and n = 100 as its default ("tri-shape").
    """

    num_sink_tokens: int = 128
    window: int = 3968
    num_dense_queries: int = 100
    block_size: int = 64

    def __post_init__(self) -> None:
        for name in ("num_sink_tokens", "window", "num_dense_queries", "block_size"):
            expect(self, name, 1)

    def choose(self, prompt: Prompt) -> Selection:
        chosen = AShape(self.num_sink_tokens, self.window, self.block_size).choose(prompt)
        return dataclasses.replace(chosen, num_dense_queries=self.num_dense_queries)
