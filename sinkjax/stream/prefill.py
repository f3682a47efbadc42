"""A prompt of any length through a model, in chunks of one size: one compilation for all."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sinkjax.cache import Cache, keep_layout
from sinkjax.stream.structure import Structure, by_rows, for_rows, place, split, whole_logits


def prefill(
    model: Any,
    cache: Cache,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    chunk_size: int = 256,
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits that follow each row's last token, and the cache after it.

    The result does not depend on `chunk_size`, and memory does not depend on the number of tokens.
    The last chunk is padded, so every prompt length runs the same compiled program.

    Args:
        model: called as `model(tokens, positions=…, cache=…)`. If its parameters lie on a mesh, the
            cache is laid out on it by `cache_shardings`, and so is what comes back.
        cache: with B rows, of any age each. It is donated: use the one that comes back.
        tokens: [B, T] ids.
        lengths: [B], how many tokens of each row count; None is all.
        chunk_size: tokens per step.

    Returns:
        logits [B, V] (0 for a row of length 0) and the cache.

    Raises:
        ValueError: no tokens, shapes that do not fit, or a cache without room.
    """
    ids = np.asarray(tokens)
    rows = cache.time.shape[0]
    if ids.ndim != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
        raise ValueError(f"tokens: expected [B, T] with B={rows} and T > 0, got {ids.shape}")
    counts = np.full(rows, ids.shape[1]) if lengths is None else np.asarray(lengths)
    if counts.shape != (rows,) or counts.min() < 0 or counts.max() > ids.shape[1]:
        raise ValueError(
            f"lengths: expected {rows} numbers of 0 to T={ids.shape[1]}, got {counts.tolist()}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    cache.require_room(counts)
    structure, arrays = split(model)
    run, cache = _chunk(structure), place(structure, cache)
    logits = None
    for start in range(0, int(counts.max()), chunk_size):
        part = np.zeros((rows, chunk_size), np.int32)
        have = ids[:, start : start + chunk_size]
        part[:, : have.shape[1]] = have
        valid = np.clip(counts - start, 0, chunk_size).astype(np.int32)
        last, cache = run(arrays, cache, part, valid)
        some = valid[:, None] > 0
        logits = last if logits is None else jnp.where(some, last, logits)
    if logits is None:
        raise ValueError("lengths: expected at least one token in some row, got none")
    return jnp.where(counts[:, None] > 0, logits, 0), cache


@functools.lru_cache(maxsize=16)
def _chunk(structure: Structure) -> Callable:
    """The jitted step of a model; kept per model structure so that a chat compiles once."""

    def run(arrays, cache, tokens, valid):
        model, length = structure.model(arrays), tokens.shape[1]
        tokens, valid = by_rows(tokens), by_rows(valid)
        positions = jnp.where(jnp.arange(length) < valid[:, None], cache.next_positions(length), -1)
        output = model(tokens, positions=positions, cache=cache)
        last = jnp.maximum(valid - 1, 0)[:, None, None]
        # The logits of all other tokens are never computed: jit drops them.
        hidden = take_tokens(output.hidden, last)
        return whole_logits(model.head(hidden)[:, 0]), keep_layout(output.cache)

    return structure.jit(run, donate_argnames=("cache",))


def take_tokens(hidden: Float[Array, "B T D"], index: Int[Array, "B n 1"]) -> Float[Array, "B n D"]:
    """Some tokens of each row, on any mesh."""
    return for_rows(lambda x, at: jnp.take_along_axis(x, at, axis=1), hidden, index)
