"""Units of work of the TPU backward kernels: some keys with some columns, the queries of some heads.

Scores are transposed, keys × queries, so that the log-sum-exp, D − dL and the first visible key of each
query are compact rows. Queries of several heads of a group stand side by side as columns: dk and dv
are then summed over them by the matmul itself, and keys and values are loaded once.

The formulas are those of `flash.families` by `tpu_policies`: dV = Pᵀ dO, dX = slope ∘ (dP − (D − dL)).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.tpu_tiles import GRAIN, Static, dot

Columns = tuple[tuple[int, int, int], ...]  # head of the block, first query, end


@dataclasses.dataclass(frozen=True)
class Keys:
    """Some keys, as the units that share them see them.

    Args:
        number: how many.
        load: key and value tiles `[keys, H]`, `[keys, Hv]`.
        hide: sets invisible pairs to a number, given one head's columns, the first query of them and it.
        commit: takes the sums of dk and dv over the queries of the block.
        memory: what was loaded and summed so far.
    """

    number: int
    load: Callable[[], tuple[Any, Any]]
    hide: Callable[[Any, int, float], Any]
    commit: Callable[[Any, Any], None]
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unit:
    keys: Keys
    columns: Columns
    is_last: bool  # with these keys

    def over_heads(self, parts, axis: int):
        """Parts of each head's columns, side by side."""
        return tiles.join([parts(*column) for column in self.columns], axis)

    def hide(self, x, hidden: float = 0.0):
        """x, `[keys, columns]`, with invisible pairs set to `hidden`."""
        parts, at = [], 0
        for _, first, end in self.columns:
            parts.append(self.keys.hide(x[:, at : at + end - first], first, hidden))
            at += end - first
        return tiles.join(parts, 1)


def units(keys: Keys, low: int, high: int, heads: int, most: int) -> list[Unit]:
    """The units of some keys: the queries [low, high) of all heads, at most `most` of them in one."""
    if low >= high:
        return []
    pieces = [(h, x, min(x + most, high)) for h in range(heads) for x in range(low, high, most)]
    together = max(1, most // (high - low))
    groups = [tuple(pieces[n : n + together]) for n in range(0, len(pieces), together)]
    return [Unit(keys, group, n == len(groups) - 1) for n, group in enumerate(groups)]


def stacked(a: Keys, b: Keys) -> Keys:
    """The keys of both, seen by the same queries: operands are loaded into the matrix unit once."""
    n = a.number

    def load():
        (key, value), (other_key, other_value) = a.load(), b.load()
        return tiles.join([key, other_key], 0), tiles.join([value, other_value], 0)

    def hide(x, first, hidden):
        return tiles.join([a.hide(x[:n], first, hidden), b.hide(x[n:], first, hidden)], 0)

    def commit(dk, dv):
        a.commit(dk[:n], dv[:n])
        b.commit(dk[n:], dv[n:])

    return Keys(n + b.number, load, hide, commit)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a step knows of its queries: `heads` times `block` of them."""

    static: Static
    heads: int
    block: int
    scaled: Any  # q folded, [heads · block, H]
    d_out: Any  # [heads, block, Hv]
    d_out_t: Any  # [Hv, heads · block], only with wide matmuls
    log_denominator: Any  # base 2, [heads, 1, block], or None
    delta: Any
    dq: Any  # transposed, [H, heads · block]

    def _at(self, head, first, end):
        return slice(head * self.block + first, head * self.block + end)

    def _row(self, unit, ref):
        if ref is None:
            return None
        return unit.over_heads(lambda h, first, end: ref[h, :, first:end], 1)

    def _queries(self, unit):
        return unit.over_heads(lambda *column: self.scaled[self._at(*column), :], 0)

    def _d_out(self, unit):
        return unit.over_heads(lambda h, first, end: self.d_out[h, first:end, :], 0)

    def scores(self, unit):
        memory = unit.keys.memory
        if not memory:
            key, value = unit.keys.load()
            memory.update(key=key, value=value, key_t=key.T, dk=0.0, dv=0.0)
        score = dot(memory["key"], self._queries(unit), (1, 1))
        return score, dot(memory["value"], self._d_out(unit), (1, 1))

    def spread(self, unit, products):
        (score, d_weight), memory, policy = products, unit.keys.memory, self.static.policy
        score, cap_slope = self.static.capped(score)
        if not policy.has_top:  # then a score says it all
            score = unit.hide(score, policy.hidden)
        weight, slope = policy.slopes(score, self._row(unit, self.log_denominator))
        if policy.has_top:
            same = slope is weight
            weight = unit.hide(weight)
            slope = weight if same else unit.hide(slope)
        d_score = policy.d_logits(slope, score, d_weight, self._row(unit, self.delta))
        if cap_slope is not None:
            d_score = d_score * cap_slope
        weight, d_score = (x.astype(self.scaled.dtype) for x in (weight, d_score))
        if self._is_wide(unit):
            d_out_t = unit.over_heads(lambda *column: self.d_out_t[:, self._at(*column)], 1)
            memory["dv"] += dot(d_out_t, weight, (1, 1))
        else:
            memory["dv"] += dot(weight, self._d_out(unit), (1, 0))
        memory["dk"] += dot(d_score, self._queries(unit), (1, 0))
        dq, done = dot(memory["key_t"], d_score, (1, 0)), 0
        for head, first, end in unit.columns:
            self.dq[:, self._at(head, first, end)] += dq[:, done : done + end - first]
            done += end - first
        if unit.is_last:
            dv = memory["dv"].T if self._is_wide(unit) else memory["dv"]
            unit.keys.commit(memory["dk"], dv)

    def _is_wide(self, unit):
        return self.static.blocks.wide_matmuls and unit.keys.number >= GRAIN

    def begin(self, q_ref):
        for head in range(self.heads):
            at = self._at(head, 0, self.block)
            if self.static.blocks.wide_matmuls:
                self.d_out_t[:, at] = self.d_out[head].T
            self.scaled[at, :] = self.static.folded(q_ref[head])
        self.dq[...] = jnp.zeros_like(self.dq)

    def sweep(self, work: list[Unit]):
        tiles.staged(work, self.scores, self.spread)

    def write(self, dq_ref):
        for head in range(self.heads):
            for x in range(0, self.block, GRAIN):
                part = self.dq[:, self._at(head, x, x + GRAIN)].T * self.static.scale
                dq_ref[head, x : x + GRAIN, :] = part.astype(dq_ref.dtype)


def from_refs(refs, at):
    return lambda: tuple(ref[at, :] for ref in refs)


def hide_static(first_key: int, window: int | None, first_keys=None):
    """Hides by tiles whose kind is known; `first_key` is relative to the query block.

    `first_keys(first, end)`, in packed rows, is the first key that each of these queries sees, its
    window included and relative to the block too: a row.
    """

    def hide(x, first, hidden):
        lines = []
        for y in range(0, x.shape[0], GRAIN):
            line = []
            for c in range(0, x.shape[1], GRAIN):
                tile = x[y : y + GRAIN, c : c + GRAIN]
                distance = first + c - (first_key + y)
                kind = tiles.tile_kind(distance, window)
                if kind == "empty":
                    tile = jnp.full_like(tile, hidden)
                elif first_keys is not None:
                    low = first_keys(first + c, first + c + GRAIN) - (first_key + y)
                    where = keys_from(tile.shape, low)
                    if tiles.tile_kind(distance, None) == "partial":
                        where &= tiles.seen(tile.shape, distance, None, 1)
                    tile = jnp.where(where, tile, hidden)
                elif kind == "partial":
                    tile = jnp.where(tiles.seen(tile.shape, distance, window, 1), tile, hidden)
                line.append(tile)
            lines.append(tiles.join(line, 1))
        return tiles.join(lines, 0)

    return hide


def keys_from(shape, low):
    """Pairs of a tile whose key is not before `low`, a row relative to the first key of the tile."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= low


def hide_sinks(first_query, ranges):
    """Hides what sink tokens 0 … P − 1 are seen inside the window."""

    def hide(x, first, hidden):
        return jnp.where(tiles.sinks_seen(x.shape, first_query + first, ranges, 1), x, hidden)

    return hide


def hide_gathered(first_query, bounds):
    """Hides by the range of queries that see each row of a gathered tile, `bounds` `[R, 2]`."""

    def hide(x, first, hidden):
        query = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + (first_query + first)
        return jnp.where((query >= bounds[:, :1]) & (query < bounds[:, 1:]), x, hidden)

    return hide
