"""The first tokens of the segment that is open at the left edge of each shard, wherever it began.

A run of shards is summed up by the segment that is open at its right edge: how many of its tokens are
in the run, its first P ones, and whether it began there. Two neighbouring summaries join to one, so an
exclusive scan gives every shard the summary of all shards to its left, in ⌈log2⌉ of their number + 1
steps of P tokens each: nothing of what moves grows with T.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops.sequence.shift import shards, shift


@partial(jax.tree_util.register_dataclass, data_fields=["extent", "tokens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Open:
    """The segment open at the right edge of a run of tokens. All zeros: of no tokens.

    Args:
        extent: `[B, 2]`, its tokens in the run, and 1 where it begins in the run.
        tokens: `[B, P, F]`, the first of them; slots that it does not fill say nothing.
    """

    extent: Any
    tokens: Any

    @property
    def length(self) -> Int[Array, " B"]:
        return self.extent[:, 0]


def open_before(
    begins: Bool[Array, "B T"], tokens: Sequence[Float[Array, "B T _"]], number: int
) -> tuple[Int[Array, " B"], Float[Array, "B P F"]]:
    """The segment open at this shard's left edge, summed up over all shards to the left.

    Args:
        begins: True at the first token of each segment, on this shard's tokens.
        tokens: what there is of each; F is the sum of their widths.
        number: P, tokens of it that are carried.

    Returns:
        How many tokens it has left of the edge, and the first P of them.
    """
    found = shift(summarise(begins, tokens, number))
    reach = 1
    while reach < shards() - 1:
        found = join(shift(found, reach), found)
        reach *= 2
    return found.length, found.tokens


def summarise(begins, tokens, number: int) -> Open:
    """The summary of some tokens, the same arguments."""
    size = begins.shape[1]
    slots = jnp.arange(size, dtype=jnp.int32)
    start = jnp.where(begins, slots, 0).max(axis=1)
    index = jnp.minimum(start[:, None] + jnp.arange(number), size - 1)
    extent = jnp.stack([size - start, begins.any(axis=1).astype(jnp.int32)], axis=1)
    return Open(extent, jnp.concatenate([take(index, x) for x in tokens], axis=2))


def join(left: Open, right: Open) -> Open:
    """The summary of two runs of tokens that lie side by side."""
    begins = right.extent[:, 1:] > 0
    before = jnp.where(begins, 0, left.extent)  # what begins on the right has nothing on the left
    slots = jnp.arange(left.tokens.shape[1], dtype=jnp.int32) - before[:, :1]
    rest = take(jnp.maximum(slots, 0), right.tokens)
    return Open(before + right.extent, jnp.where((slots >= 0)[..., None], rest, left.tokens))


def take(index: Int[Array, "B P"], x: Float[Array, "B T F"]) -> Float[Array, "B P F"]:
    """Tokens at an index of each row."""
    return jnp.take_along_axis(x, index[..., None], axis=1)
