"""Every token kept, and chunks that attend sparsely: long prompts in less time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sinkjax.cache import ring
from sinkjax.cache.descriptions import Full, trained_window
from sinkjax.cache.ring_store import LayerState, WholeText
from sinkjax.cache.store import (
    Attended,
    Chunk,
    Finish,
    LayerSpec,
    LayerView,
    Pool,
    Store,
    at_least,
)
from sinkjax.ops.sparse import Pattern, select, sparse_attention
from sinkjax_kernels.normalizers import resolve


@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """`Full`, but a chunk of more than one token computes only the pairs that `pattern` chooses.

    Decoding is dense. What is chosen is chosen per chunk, by its own queries on all keys so far: a
    prompt in one chunk is the published method; in several, the last queries of each chunk choose
    for it. A layer with a window of its own keeps it. With `PerLayer` and `PerHead` each layer or
    head has its pattern.

    Args:
        length: tokens of the longest text; past it as in `Full`.
        pattern: one of `ops.sparse`.

    Source: Jiang et al. 2024 (MInference), arXiv 2407.02490.
    """

    length: int
    pattern: Pattern

    def __post_init__(self) -> None:
        at_least("SparsePrefill.length", self.length, 1)
        if not isinstance(self.pattern, Pattern):
            raise ValueError(
                f"SparsePrefill.pattern: expected a pattern of ops.sparse, got {self.pattern!r}"
            )

    @property
    def capacity(self) -> int:
        """The length, in tokens."""
        return self.length

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        if trained_window(spec, self.length) is not None:
            return Full(self.length).store(spec, layer, num_layers)
        return SparseChunks(self.length, self.pattern)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept", "truncated"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class SparseState:
    """Keys and values, slot p for position p, and `truncated` int32 `[B]`: the blocks, over all heads
    and chunks, that the pattern wanted and its budget had no room for."""

    kept: LayerState
    truncated: Any


@dataclasses.dataclass(frozen=True)
class SparseChunks(WholeText):
    """The store of `SparsePrefill`."""

    pattern: Pattern

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> SparseState:
        kept = self.ring.empty(spec, batch_size, dtype)
        return SparseState(kept, jnp.zeros((batch_size,), jnp.int32))

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        state: SparseState = view.state
        if chunk.positions.shape[1] == 1:
            dense = dataclasses.replace(view, state=state.kept)
            pool, keep = self.ring.extend(dense, chunk)
            return pool, lambda attended: dataclasses.replace(state, kept=keep(attended))

        # Nothing is overwritten, so the chunk may be written first: slot p then holds position p.
        index = ring.slots(self.layouts[0], chunk.positions)
        kept, faded = state.kept, chunk.faded
        decay = None if faded is None else ring.write(kept.decay, index, -faded)
        key = ring.write(kept.key, index, chunk.key)
        value = ring.write(kept.value, index, chunk.value)
        positions = ring.write(view.positions[0], index, chunk.positions)
        chosen: list[Any] = []

        def attend(query, key, value, *, scale, logits_soft_cap, normalizer, **options):
            where = {name: options[name] for name in ("query_positions", "key_positions")}
            where |= {"scale": scale, "logits_soft_cap": logits_soft_cap}
            chosen.append(select(self.pattern, query, key, **where))
            results: Any = sparse_attention(
                query,
                key,
                value,
                chosen[0],
                bias=options["bias"],
                sinks=options["sinks"],
                normalizer=normalizer,
                normalizer_params=options["normalizer_params"],
                return_residual=(with_lse := resolve(normalizer).has_log_sum_exp),
                **where,
            )
            return results if with_lse else (results, None)

        def finish(_: Attended) -> SparseState:
            aged = None if faded is None else decay + faded[:, -1, :, None]
            lost = state.truncated + chosen[0].truncated.sum(axis=1)
            return SparseState(LayerState(key, value, aged), lost)

        return Pool(key, value, positions, decay=decay, attend=attend), finish
