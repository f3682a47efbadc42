"""A name for what the backward pass of attention reads of the forward pass, for `jax.checkpoint`."""

from typing import TypeVar

from jax.ad_checkpoint import checkpoint_name

Tree = TypeVar("Tree")

SAVED = "flash_attention"
"""With `save_only_these_names(SAVED)` the forward kernel is not run a second time."""


def saved(results: Tree) -> Tree:
    """The output and the log-sum-exp under the name `SAVED`."""
    return checkpoint_name(results, SAVED)
