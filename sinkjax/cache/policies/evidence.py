"""What a policy may look at, and what it must answer."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.ops.rope import Rope


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "positions", "time", "queries", "query_positions", "mass"],
    meta_fields=["scale", "rope", "logits_soft_cap"],
)
@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one layer holds, and what its last queries looked for.

    Args:
        key: `[B, K, S, H]`, each rotated at its own position.
        value: `[B, K, S, Hv]`.
        positions: `[B, K, S]` int32; −1 is an empty slot, whose key and value mean nothing.
        time: `[B]`, tokens each row has taken, those held included.
        queries: `[B, w, N, H]`, the last w queries, rotated, oldest first; None: not recorded.
        query_positions: `[B, w]`; a query at −1 does not count.
        mass: `[B, K, S]`, attention that each token has drawn, a mean over its group of query heads:
            after a chunk of T queries $m \\leftarrow \\gamma^T m + \\sum_t \\gamma^{T-1-t} a_t$ with γ the
            policy's `discount`; None: not recorded.
        scale: of the logits; None is 1/√H.
        rope: the rotation in key and queries; None: there is none.
        logits_soft_cap: c in c·tanh(logit / c), or None.
    """

    # `Any` in pytrees: their leaves are not always arrays (`jax.eval_shape`, `jax.tree.map`).
    key: Any
    value: Any
    positions: Any
    time: Any
    queries: Any = None
    query_positions: Any = None
    mass: Any = None
    scale: float | None = None
    rope: Rope | None = None
    logits_soft_cap: float | None = None

    @property
    def held(self) -> Any:
        """`[B, K, S]`, True where a slot holds a token."""
        return self.positions >= 0


@runtime_checkable
class Policy(Protocol):
    """Which tokens are worth keeping: a frozen dataclass whose one method is a pure function.

    It does not say which tokens are safe whatever their score (`protect`) nor how many are kept (the
    capacity, or a budget); `keep` brings the three together.

    - `num_queries`: how many of the last queries it wants in the evidence; 0: none.
    - `discount`: γ of the attention mass it wants; None: no mass, 1.0: a plain sum.
    """

    @property
    def num_queries(self) -> int: ...

    @property
    def discount(self) -> float | None: ...

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Higher is kept; what an empty slot gets does not matter."""
        ...


def last_weights(evidence: Evidence, name: str) -> Float[Array, "B K G w S"]:
    """Attention weights of the last queries on what is held, 0 where a query may not look.

    Softmax over the tokens held at or before each query, float32 at least; a query at position −1 has
    weights of 0.

    Args:
        name: the policy that asks, for the error.

    Raises:
        ValueError: the evidence has no queries, or their heads are no multiple of K.
    """
    queries, at = evidence.queries, evidence.query_positions
    if queries is None or at is None:
        raise ValueError(f"evidence: {name} needs queries and query_positions, got None")
    B, w, N, H = queries.shape
    K = evidence.key.shape[1]
    if N % K:
        raise ValueError(f"evidence: expected query heads in groups of {K} key heads, got {N}")
    dtype = jnp.promote_types(evidence.key.dtype, jnp.float32)
    q_BwKGH = queries.reshape(B, w, K, N // K, H).astype(dtype)
    logits = jnp.einsum("BwKGH,BKSH->BKGwS", q_BwKGH, evidence.key.astype(dtype))
    logits *= H**-0.5 if evidence.scale is None else evidence.scale
    if evidence.logits_soft_cap is not None:
        logits = evidence.logits_soft_cap * jnp.tanh(logits / evidence.logits_soft_cap)
    where = evidence.held[:, :, None] & (evidence.positions[:, :, None] <= at[:, None, :, None])
    where = where[:, :, None]
    logits = jnp.where(where, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(dtype).min)
    weights = jnp.where(where, jnp.exp(logits - top), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def required_mass(evidence: Evidence, name: str) -> Float[Array, "B K S"]:
    """The attention mass, in float32 at least.

    Raises:
        ValueError: the evidence has none.
    """
    if evidence.mass is None:
        raise ValueError(f"evidence: {name} needs the attention mass, got None")
    return evidence.mass.astype(jnp.promote_types(evidence.mass.dtype, jnp.float32))
