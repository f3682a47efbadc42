"""The ordered family: weights depend on which keys are nearer to the query."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sinkjax_kernels.normalizers.description import Family, Normalizer


@dataclasses.dataclass(frozen=True)
class StickBreaking(Normalizer, name="stick_breaking"):
    r"""$w_j = \sigma(x_j) \prod_{j < k < i} (1 - \sigma(x_k))$: the newest keys break off first.

    Each key takes its part of what is left. Sums to at most one, the rest of the stick goes nowhere;
    recency is built in, so no position embedding is needed. The query's own key is not visible. In
    logarithms:
    $\ln w_j = \ln \sigma(x_j) + \sum_{k > j} \ln \sigma(-x_k)$ over the visible keys in the order of
    their positions, summed from the newest on, so that nothing cancels.
    Source: Tan et al. 2024, arXiv 2410.17980; `shawntan/stickbreaking-attention`, `sb_ref.py`.
    """

    family: ClassVar[Family] = "ordered"
    excludes_self: ClassVar[bool] = True
    needs_causal: ClassVar[bool] = True

    def weigh(self, rows):
        left = rows.masked(jax.nn.log_sigmoid(-rows.seen))  # of the stick, after each key
        if rows.key_order is None:
            left = jnp.flip(left, -1)
        else:
            newest_first = jnp.argsort(-rows.key_order, axis=-1)
            left = _reorder(left, newest_first)
        before = jnp.cumsum(jnp.pad(left[..., :-1], [(0, 0)] * (left.ndim - 1) + [(1, 0)]), axis=-1)
        if rows.key_order is None:
            before = jnp.flip(before, -1)
        else:
            before = _reorder(before, jnp.argsort(newest_first, axis=-1))
        return rows.masked(jnp.exp(jax.nn.log_sigmoid(rows.seen) + before)), None


def _reorder(x, order):
    """The last axis of x in another order, the same for all rows that `order` broadcasts over."""
    return jnp.take_along_axis(
        x, order.reshape((1,) * (x.ndim - order.ndim) + order.shape), axis=-1
    )
