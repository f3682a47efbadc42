"""Queries of a prompt and the keys they may look at, cut into blocks: what every pattern reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_EXACT = jax.lax.Precision.HIGHEST
_NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One call, padded to whole blocks. Letters: Q blocks of queries, J blocks of keys, of b tokens.

    Args:
        query: `[B, Q·b, N, H]`.
        key: `[B, K, J·b, H]`; slot s is position s.
        query_positions: `[B, Q·b]`, −1 is padding.
        exists: bool `[B, J·b]`, slots that hold a key.
        scale, logits_soft_cap: of the logits.
        block_size: b.
    """

    query: Any
    key: Any
    query_positions: Any
    exists: Any
    scale: float
    logits_soft_cap: float | None
    block_size: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, Q, J."""
        B, T, N, _ = self.query.shape
        return B, N, T // self.block_size, self.key.shape[2] // self.block_size

    def logits(self, products: Array) -> Array:
        """Products of queries and keys after scale and soft cap."""
        products = products * self.scale
        if self.logits_soft_cap is None:
            return products
        return self.logits_soft_cap * jnp.tanh(products / self.logits_soft_cap)

    @functools.cached_property
    def newest(self) -> Int[Array, " B"]:
        """Position of the last query of each row."""
        return self.query_positions.max(axis=1)

    @functools.cached_property
    def span(self) -> tuple[Int[Array, "B Q"], Int[Array, "B Q"]]:
        """First and last position of each block of queries; the last is −1 where all is padding."""
        blocks = self.query_positions.reshape(self.query_positions.shape[0], -1, self.block_size)
        return jnp.where(blocks < 0, _NEVER, blocks).min(axis=-1), blocks.max(axis=-1)

    @functools.cached_property
    def candidates(self) -> Bool[Array, "B Q J"]:
        """Key blocks with a key that some query of the block sees."""
        slot = jnp.arange(self.exists.shape[1], dtype=jnp.int32)
        first = jnp.where(self.exists, slot, _NEVER)
        first = first.reshape(first.shape[0], -1, self.block_size).min(axis=-1)
        return first[:, None, :] <= self.span[1][:, :, None]

    @functools.cached_property
    def forced(self) -> Bool[Array, "B Q J"]:
        """The block of the sink and those of the queries themselves: two where blocks do not align."""
        block = jnp.arange(self.sizes[3], dtype=jnp.int32)
        first, last = (x[:, :, None] // self.block_size for x in self.span)
        return self.candidates & ((block == 0) | ((first <= block) & (block <= last)))

    @functools.cached_property
    def pooled_query(self) -> Float[Array, "B N Q H"]:
        """Mean query of each block, padding left out."""
        seen = (self.query_positions >= 0)[:, None]
        return block_means(self.query.swapaxes(1, 2), seen, self.block_size)

    @functools.cached_property
    def pooled_key(self) -> Float[Array, "B K J H"]:
        """Mean key of each block, empty slots and those past the last query left out."""
        slot = jnp.arange(self.exists.shape[1], dtype=jnp.int32)
        seen = self.exists & (slot <= self.newest[:, None])
        return block_means(self.key, seen[:, None], self.block_size)

    def pooled_logits(self, query: Float[Array, "B N q H"]) -> Float[Array, "B N q J"]:
        """Logits of mean queries with the mean keys of all blocks."""
        B, N, q, H = query.shape
        K = self.pooled_key.shape[1]
        grouped = query.reshape(B, K, N // K, q, H)
        products = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, self.pooled_key, precision=_EXACT)
        return self.logits(products).reshape(B, N, q, -1)


def block_means(
    x: Float[Array, "B n t H"], where: Bool[Array, "B 1 t"], size: int
) -> Float[Array, "B n j H"]:
    """Mean over the tokens of each block that count; 0 where none does. Float32 at least."""
    B, n, _, H = x.shape
    x = jnp.where(where[..., None], x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0)
    total = x.reshape(B, n, -1, size, H).sum(axis=3)
    count = where.reshape(B, 1, -1, size).sum(axis=-1)
    return total / jnp.maximum(count, 1)[..., None].astype(total.dtype)


def to_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    query_positions: Int[Array, "B T"] | None,
    key_positions: Int[Array, "B S"] | None,
    scale: float | None,
    logits_soft_cap: float | None,
    block_size: int,
) -> Prompt:
    """A prompt from the arguments of a public function, checked."""
    B, T, N, H = query.shape
    K, S = key.shape[1:3]
    if N % K:
        raise ValueError(
            f"query: the number of heads N must be divisible by the number of key/value heads K, "
            f"got N={N}, K={K}"
        )
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap: expected more than 0, got {logits_soft_cap}")
    if query_positions is None:
        if T > S:
            raise ValueError(f"query_positions: needed with more queries ({T}) than keys ({S})")
        query_positions = jnp.broadcast_to(jnp.arange(S - T, S, dtype=jnp.int32), (B, T))
    exists = jnp.ones((B, S), bool) if key_positions is None else key_positions >= 0
    more_q, more_k = -T % block_size, -S % block_size
    return Prompt(
        query=jnp.pad(query, [(0, 0), (0, more_q), (0, 0), (0, 0)]),
        key=jnp.pad(key, [(0, 0), (0, 0), (0, more_k), (0, 0)]),
        query_positions=jnp.pad(query_positions, [(0, 0), (0, more_q)], constant_values=-1),
        exists=jnp.pad(exists, [(0, 0), (0, more_k)]),
        scale=H**-0.5 if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
        block_size=block_size,
    )
