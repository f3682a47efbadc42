"""What the forward TPU kernels do with the scores of some rows: weigh, gather values, divide, write."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_policies import LOG2_E
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static, dot


def _over_lanes(combine, parts):
    """Elementwise over 128-lane columns of all parts: one reduction across lanes is left to do."""
    columns = [part[:, x : x + GRAIN] for part in parts for x in range(0, part.shape[1], GRAIN)]
    return functools.reduce(combine, columns)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The queries of one of the heads of a grid step.

    Args:
        head: which of them.
        sink: its sink logit in base 2, or None.
    """

    static: Static
    head: int
    sink: Any

    @classmethod
    def of_step(cls, static: Static, heads: int, sinks_ref) -> "list[Rows]":
        """Of the heads that grid axes 1 and 3 point at."""
        if not static.has_sinks:
            return [cls(static, head, None) for head in range(heads)]
        first = (pl.program_id(1) * pl.num_programs(3) + pl.program_id(3)) * heads
        return [cls(static, head, sinks_ref[first + head] * LOG2_E) for head in range(heads)]

    @property
    def sums_by_matmul(self) -> bool:
        """Whether a column of ones beside the values makes the sum of a row."""
        return self.static.blocks.wide_matmuls and self.static.policy.counts_numerators

    def hide(self, score, where):
        """Scores with those of invisible pairs replaced."""
        return jnp.where(where, score, self.static.policy.hidden)

    def largest(self, scores):
        return _over_lanes(jnp.maximum, scores).max(axis=1, keepdims=True)

    def top(self, scores) -> Any:
        """The largest score of each row, or what the policy puts in its place; None without one."""
        if not self.static.policy.has_top:
            return None
        top, start = self.largest(scores), self.static.policy.start(self.sink)
        return top if start is None else jnp.maximum(top, start)

    def gather(self, scores, values, top):
        """What counts in the denominator, and the numerators times the values.

        The first is 128 columns: partial sums that are left to add, or with `sums_by_matmul` the same
        number; None where nothing is divided.
        """
        policy = self.static.policy
        terms, counted = [], []
        for score in scores:
            wide = None if top is None else tiles.lanes(top, score.shape[1])
            term, count = policy.terms(score, wide)
            terms.append(term)
            counted.append(count)
        if not self.sums_by_matmul:
            total = _over_lanes(jnp.add, counted) if policy.has_top else None
            return total, _sum_of_products(terms, values)
        ones = [jnp.ones((v.shape[0], GRAIN), v.dtype) for v in values]
        values = [tiles.join([one, v], 1) for one, v in zip(ones, values, strict=True)]
        both = _sum_of_products(terms, values)
        return both[:, :GRAIN], both[:, GRAIN:]

    def finish(self, out_ref, lse_ref, at: slice, top: Any, total: Any, acc) -> None:
        """Divide by the denominator, and turn its logarithm from a column into a compact row."""
        if self.static.policy.has_top:
            if not self.sums_by_matmul:
                total = jnp.broadcast_to(total.sum(axis=1, keepdims=True), total.shape)
            total = self.static.policy.denominator(total, top, self.sink)
            acc = acc / tiles.lanes(total, acc.shape[1])
            lse_ref[self.head, :, at] = ((top + jnp.log2(total)) * (1 / LOG2_E)).T[:1]
        out_ref[self.head, at, :] = acc.astype(out_ref.dtype)


def _sum_of_products(terms, values):
    products = [dot(p.astype(v.dtype), v, (1, 0)) for p, v in zip(terms, values, strict=True)]
    return functools.reduce(jnp.add, products)
