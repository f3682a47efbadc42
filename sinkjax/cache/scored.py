"""A cache whose tokens stay by score: eviction while decoding, compression of a prompt."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sinkjax.cache import ring
from sinkjax.cache.budgets import Budget, Uniform
from sinkjax.cache.descriptions import PositionMode, SinkWindow, trained_window
from sinkjax.cache.policies.evidence import Evidence, Policy, last_weights
from sinkjax.cache.policies.keep import keep, weakest
from sinkjax.cache.policies.protect import protect
from sinkjax.cache.store import (
    Attended,
    Chunk,
    Finish,
    LayerSpec,
    LayerView,
    Layout,
    Pool,
    Store,
    at_least,
)
from sinkjax.ops.rope import Rope, rotate

_QUERIES = 128  # whose weights are in memory together


@dataclasses.dataclass(frozen=True)
class Scored:
    """The sink tokens, the last tokens, and between them those with the highest scores.

    A chunk attends to what is held and to itself, and then the C tokens with the highest scores stay,
    in every key/value head its own: a prompt in one chunk is compressed as a whole, a token that is
    decoded takes the place of the weakest one. So the result does depend on how a prompt was cut,
    unless the mask of the policy is one of positions.

    Position modes (RoPE, ALiBi):

    - ``absolute``: every token keeps its position in the text, as in the literature on prompts.
    - ``cache_relative``: what is left of the text counts as if it had been all there was: a query at
      t meets the held token of rank r (of n before the chunk, which begins at s) at distance
      t − s + n − r. No distance exceeds C and the chunk together, however long the stream; keys are
      stored as they were and rotated in each step, which takes time in proportion to C.

    A layer that was trained with a window of its own keeps that.

    Args:
        policy: gives the scores; `sinkjax.cache.policies`.
        budget: C, tokens per key/value head, at least P + W; or `budgets.Pyramid` for one per layer.
        num_sink_tokens: P, first tokens of the text, protected whatever their score.
        window: W, last tokens of the text, protected likewise; at least 1.
        position_mode: one of the two above.
        every: decoded tokens between two scorings, at most W, so that every token has a score when it
            leaves the window. For policies that are dear: SnapKV, LagKV, expected attention.

    Source: scores, protection and budget as separate arguments: kvpress mixes them, and loses
        protected tokens on ties (its issue #227).
    """

    policy: Policy
    budget: Budget | int = 1024
    num_sink_tokens: int = 4
    window: int = 64
    position_mode: PositionMode = "absolute"
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise ValueError(f"Scored.policy: expected a policy, got {self.policy!r}")
        at_least("Scored.num_sink_tokens", self.num_sink_tokens, 0)
        at_least("Scored.window", self.window, 1)
        at_least("Scored.every", self.every, 1)
        if self.every > self.window:
            raise ValueError(
                f"Scored.every: expected at most the window of {self.window}, got {self.every}"
            )
        if self.position_mode not in get_args(PositionMode):
            raise ValueError(
                f"Scored.position_mode: expected one of {', '.join(get_args(PositionMode))}, "
                f"got {self.position_mode!r}"
            )
        if not isinstance(self.budget, Budget):
            at_least("Scored.budget", self.budget, self.num_sink_tokens + self.window)

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        if spec.num_forget_heads:
            raise ValueError("Scored: expected layers without forget gates, whose decay it drops")
        budget = self.budget if isinstance(self.budget, Budget) else Uniform(self.budget)
        capacity, least = budget.layer(layer, num_layers), self.num_sink_tokens + self.window
        if capacity < least:
            raise ValueError(
                f"Scored.budget: expected at least num_sink_tokens + window = {least} tokens, "
                f"layer {layer} gets {capacity} of {budget}"
            )
        own = trained_window(spec, capacity)
        if own is not None:
            return SinkWindow(spec.num_sink_tokens, own, self.position_mode).store(spec)
        cap = capacity - 1 if self.position_mode == "cache_relative" else None
        return Scores(self.policy, capacity, self.num_sink_tokens, self.window, cap, self.every)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "positions", "scores", "mass", "queries", "query_positions"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ScoredState:
    """What a layer holds, and what its policy wants to know of the past.

    Args:
        key, value: [B, K, C, H], keys rotated at their positions.
        positions: [B, K, C] int32, −1 is empty; slots are in no order.
        scores: [B, K, C] float32, what the policy thinks of each since the last chunk.
        mass: [B, K, C] float32, see `Evidence`; None when the policy does not ask.
        queries, query_positions: [B, w, N, H] and [B, w], the last ones, likewise.
    """

    key: Any
    value: Any
    positions: Any
    scores: Any
    mass: Any = None
    queries: Any = None
    query_positions: Any = None

    @property
    def time(self) -> Int[Array, " B"]:
        """Tokens taken: the last one is always held, as its window is protected."""
        return self.positions.max((1, 2)) + 1


@dataclasses.dataclass(frozen=True)
class Scores:
    """The store of one layer."""

    policy: Policy
    capacity: int
    num_sink_tokens: int
    window: int
    position_cap: int | None
    every: int = 1
    limit: None = None
    layouts: tuple[Layout, ...] = ()

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> ScoredState:
        B, K, C, H = batch_size, spec.num_kv_heads, self.capacity, spec.head_dim
        mass = queries = at = None
        if self.policy.discount is not None:
            mass = jnp.zeros((B, K, C))
        if self.policy.num_queries:
            if spec.num_heads is None:
                raise ValueError("LayerSpec.num_heads: expected a number with a policy of queries")
            queries = jnp.zeros((B, self.policy.num_queries, spec.num_heads, H), dtype)
            at = jnp.full((B, self.policy.num_queries), -1, jnp.int32)
        return ScoredState(
            jnp.zeros((B, K, C, H), dtype),
            jnp.zeros((B, K, C, H), dtype),
            jnp.full((B, K, C), -1, jnp.int32),
            jnp.zeros((B, K, C)),
            mass,
            queries,
            at,
        )

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        state: ScoredState = view.state
        B, K, C = state.positions.shape
        if chunk.positions.shape[1] == 1:
            empty, time = state.positions < 0, state.time
            # One less: the token to come is the last of its window.
            safe = protect(state.positions, time, self.num_sink_tokens, self.window - 1)
            place = weakest(state.scores, safe, empty, state.positions)
            slot = jnp.where(chunk.positions >= 0, place, C)  # past the end: dropped
            b, k = jnp.ogrid[:B, :K]

            def put(leaf, new):
                at = leaf.at[b, k, slot]
                return at.set(new, mode="drop", unique_indices=True)

            held = dataclasses.replace(
                state,
                key=put(state.key, chunk.key[:, 0]),
                value=put(state.value, chunk.value[:, 0]),
                positions=put(state.positions, chunk.positions),
                mass=None if state.mass is None else put(state.mass, 0.0),
            )
        else:
            T = chunk.positions.shape[1]
            new = jnp.broadcast_to(chunk.positions[:, None], (B, K, T))
            held = dataclasses.replace(
                state,
                key=jnp.concatenate([state.key, chunk.key.swapaxes(1, 2)], axis=2),
                value=jnp.concatenate([state.value, chunk.value.swapaxes(1, 2)], axis=2),
                positions=jnp.concatenate([state.positions, new], axis=2),
                mass=None
                if state.mass is None
                else jnp.concatenate([state.mass, jnp.zeros((B, K, T))], axis=2),
            )

        def finish(attended: Attended) -> ScoredState:
            seen = self._observe(held, chunk.positions, attended)
            return self._settle(seen, attended, chunk.positions.shape[1] == 1)

        if self.position_cap is None:
            return Pool(held.key, held.value, held.positions), finish
        keys, seen = self._closed_up(held, state.time, chunk.rope)
        return Pool(keys, held.value, seen), finish

    def _closed_up(self, held: ScoredState, begin: Int[Array, " B"], rope: Rope | None):
        """Keys as queries from `begin` on meet them, and at which positions: without gaps."""
        if self.position_cap is None:
            return held.key, held.positions
        begin = begin[:, None, None]
        old = (held.positions >= 0) & (held.positions < begin)
        rank = jnp.argsort(jnp.argsort(jnp.where(old, held.positions, ring.LIMIT), axis=2), axis=2)
        seen = begin - old.sum(2, keepdims=True) + rank
        seen = jnp.where(old, seen, held.positions)
        if rope is None:
            return held.key, seen
        return rotate(held.key[..., None, :], seen - held.positions, rope)[..., 0, :], seen

    def _observe(
        self, held: ScoredState, positions: Int[Array, "B T"], attended: Attended
    ) -> ScoredState:
        """What the policy wants to know of the chunk's queries."""
        query = attended.query
        discount, w = self.policy.discount, self.policy.num_queries
        if discount is not None:
            seen = self._evidence(held, attended, attended.key)
            mass = _mass(seen, query, positions, discount)
            held = dataclasses.replace(held, mass=mass)
        if w:
            # Padding is at the end of a chunk or fills it: what stays are the last real ones.
            queries = jnp.concatenate([held.queries, query.astype(held.queries.dtype)], axis=1)
            at = jnp.concatenate([held.query_positions, positions], axis=1)
            order = jnp.argsort(at, axis=1)[:, -w:]
            held = dataclasses.replace(
                held,
                queries=jnp.take_along_axis(queries, order[..., None, None], axis=1),
                query_positions=jnp.take_along_axis(at, order, axis=1),
            )
        return held

    def _settle(self, held: ScoredState, attended: Attended, is_step: bool) -> ScoredState:
        """Down to C tokens, and what they are worth among themselves."""
        if held.positions.shape[2] > self.capacity:
            scores = self.policy.scores(self._evidence(held, attended, attended.key))
            safe = protect(held.positions, held.time, self.num_sink_tokens, self.window)
            held = select(held, keep(scores, safe, held.positions < 0, self.capacity))

        def score(held: ScoredState) -> Float[Array, "B K C"]:
            keys, _ = self._closed_up(held, held.time, attended.rope)
            scores = self.policy.scores(self._evidence(held, attended, keys))
            return scores.astype(jnp.float32)

        if is_step and self.every > 1:
            due = (held.time % self.every == 0).any()
            scores = jax.lax.cond(due, score, lambda held: held.scores, held)
        else:
            scores = score(held)
        return dataclasses.replace(held, scores=scores)

    def _evidence(self, held: ScoredState, attended: Attended, key: Any) -> Evidence:
        return Evidence(
            key,
            held.value,
            held.positions,
            held.time,
            held.queries,
            held.query_positions,
            held.mass,
            attended.scale,
            attended.rope,
            attended.logits_soft_cap,
        )


def select(held: ScoredState, kept: Int[Array, "B K n"]) -> ScoredState:
    """The tokens in these slots; −1 is an empty one."""
    index = jnp.maximum(kept, 0)

    def take(leaf):
        return jnp.take_along_axis(leaf, index if leaf.ndim == 3 else index[..., None], axis=2)

    return dataclasses.replace(
        held,
        key=take(held.key),
        value=take(held.value),
        positions=jnp.where(kept < 0, -1, take(held.positions)),
        mass=None if held.mass is None else take(held.mass),
    )


def _mass(
    evidence: Evidence,
    query: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    discount: float,
) -> Float[Array, "B K S"]:
    """The mass after these queries; weights as of softmax, whatever else the layer's divides by."""
    B, T = positions.shape
    real = positions >= 0
    # Of the queries that come after each: what it sees fades as often.
    later = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] - real
    fading = jnp.where(real, jnp.asarray(discount, jnp.float32) ** later, 0)
    mass = evidence.mass * (discount ** real.sum(1).astype(jnp.float32))[:, None, None]
    size = min(T, _QUERIES)
    blocks = -(-T // size)
    rest = [(0, 0), (0, blocks * size - T)]

    def cut(x, fill):
        x = jnp.pad(x, rest + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, blocks, size, *x.shape[2:]), 1, 0)

    def add(mass, block):
        q, at, weight = block
        seen = dataclasses.replace(evidence, queries=q, query_positions=at)
        weights = last_weights(seen, "attention mass")  # [B, K, G, T, S]
        return mass + jnp.einsum("BKGTS,BT->BKS", weights, weight) / weights.shape[2], None

    return jax.lax.scan(add, mass, (cut(query, 0), cut(positions, -1), cut(fading, 0)))[0]
