"""From each shard to one on its right."""

from typing import TypeVar

import jax

AXIS = "sequence"
"""The mesh axis along which tokens are cut, shard 0 first."""

Tree = TypeVar("Tree")


def shards() -> int:
    """How many devices share a row."""
    return jax.lax.axis_size(AXIS)


def shift(tree: Tree, by: int = 1, *, wrap: bool = False) -> Tree:
    """What the shard `by` to the left has; where there is none zeros, or with `wrap` the last ones."""
    n = shards()
    pairs = [(d, (d + by) % n) for d in range(n if wrap else n - by)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)
