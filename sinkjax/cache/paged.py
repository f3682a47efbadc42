"""Quest: every token is kept, and a decoding step reads the pages that can matter to it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sinkjax.cache import ring
from sinkjax.cache.descriptions import Full, trained_window
from sinkjax.cache.ring_store import LayerState, Ring, WholeText
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
from sinkjax.ops.decode import decode_attention
from sinkjax.ops.sparse import best_pages, page_bounds
from sinkjax_kernels.normalizers import resolve


@dataclasses.dataclass(frozen=True)
class PagedTopK:
    """`Full`, but a single token attends to the `num_pages` pages that promise most.

    Per page and channel the least and the largest key are kept; they bound the logit that any key of
    the page can have with a query. Nothing is evicted: what does not matter now may later. Memory is
    that of `Full` and 2/`page_size` of its keys; a step reads these and `num_pages` pages. The heads
    of a group read the same pages, those that one of them wants most. Chunks of more than one token
    attend to everything.

    Args:
        length: tokens of the longest text; past it as in `Full`.
        page_size: tokens per page.
        num_pages: pages that a step reads, page 0 with the sinks and the newest among them.
        num_recent_pages: newest pages that are always read; the last may have just begun.
        num_dense_layers: first layers that always read everything.

    Source: Tang et al. 2024 (Quest), arXiv 2406.10774: pages of 16, budgets around 1024 tokens and
    two dense layers (`mit-han-lab/Quest`); there a query head is a key/value head, and page 0 is read
    only for its score.
    """

    length: int
    page_size: int = 16
    num_pages: int = 64
    num_recent_pages: int = 2
    num_dense_layers: int = 2

    def __post_init__(self) -> None:
        at_least("PagedTopK.length", self.length, 1)
        at_least("PagedTopK.page_size", self.page_size, 1)
        at_least("PagedTopK.num_recent_pages", self.num_recent_pages, 1)
        at_least("PagedTopK.num_pages", self.num_pages, 1 + self.num_recent_pages)
        at_least("PagedTopK.num_dense_layers", self.num_dense_layers, 0)

    @property
    def capacity(self) -> int:
        """The length, in tokens."""
        return self.length

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        """Dense where pages would save nothing: with a window of its own, or room for all pages."""
        saves = self.num_pages * self.page_size < self.length
        if (
            trained_window(spec, self.length) is not None
            or layer < self.num_dense_layers
            or not saves
        ):
            return Full(self.length).store(spec, layer, num_layers)
        return Pages(self.length, self.page_size, self.num_pages, self.num_recent_pages)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kept", "low", "high"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class PagedState:
    """Keys and values, slot p for position p, and per page the least and largest key of each channel,
    `[B, K, J, H]`; ∞ and −∞ where a page is empty."""

    kept: LayerState
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class Pages(WholeText):
    """The store of `PagedTopK`."""

    page_size: int
    num_pages: int
    num_recent_pages: int

    @property
    def ring(self) -> Ring:
        slots = -(-self.length // self.page_size) * self.page_size
        return Ring(0, slots, None, 0, None, self.length)

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> PagedState:
        kept = self.ring.empty(spec, batch_size, dtype)
        B, K, C, H = kept.key.shape
        shape = (B, K, C // self.page_size, H)
        return PagedState(kept, jnp.full(shape, jnp.inf, dtype), jnp.full(shape, -jnp.inf, dtype))

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        state: PagedState = view.state
        rows = jnp.arange(chunk.positions.shape[0])[:, None]
        page = chunk.positions // self.page_size
        page = jnp.where(chunk.positions >= 0, page, state.low.shape[2])
        low = state.low.at[rows, :, page].min(chunk.key, mode="drop")
        high = state.high.at[rows, :, page].max(chunk.key, mode="drop")
        pool, keep = self.ring.extend(dataclasses.replace(view, state=state.kept), chunk)

        def finish(attended: Attended) -> PagedState:
            return PagedState(keep(attended), low, high)

        if pool.slot is None:
            return pool, finish
        # Written before it is read: pages are gathered from the cache with the token in it.
        at = pool.slot[:, None]
        key, value = ring.write(pool.key, at, chunk.key), ring.write(pool.value, at, chunk.value)
        attend = functools.partial(self._attend, low=low, high=high)
        return pool._replace(key=key, value=value, slot=None, attend=attend), finish

    def _attend(self, query, key, value, *, low, high, key_positions, bias, **options):
        B, K, C, _ = key.shape
        N, J = query.shape[2], C // self.page_size
        bounds = page_bounds(query[:, 0], low, high)
        bounds = bounds * (query.shape[3] ** -0.5 if options["scale"] is None else options["scale"])
        if (cap := options["logits_soft_cap"]) is not None:
            bounds = cap * jnp.tanh(bounds / cap)
        if bias is not None:
            bias = jnp.broadcast_to(bias, (B, N, 1, C)).reshape(B, N, J, self.page_size)
            bounds = bounds + bias.max(axis=-1)
        paged = key_positions.reshape(B, J, self.page_size)
        index = best_pages(
            bounds,
            (paged >= 0).any(axis=-1),
            options["query_positions"][:, 0] // self.page_size,
            num_kv_heads=K,
            num_pages=self.num_pages,
            num_recent_pages=self.num_recent_pages,
        )
        some = jnp.maximum(index, 0)

        def gathered(leaf, indices):
            pages = leaf.reshape(*leaf.shape[:2], J, self.page_size, -1)
            found = jnp.take_along_axis(pages, indices[..., None, None], axis=2)
            return found.reshape(*indices.shape[:2], -1, found.shape[-1])

        if bias is not None:
            bias = gathered(bias, jnp.repeat(some, N // K, axis=1)).swapaxes(2, 3)
        # One set of positions for all heads, taken by each.
        per_head = jnp.broadcast_to(key_positions[:, None], (B, K, C))
        positions = gathered(per_head, some).reshape(B, K, -1, self.page_size)
        positions = jnp.where(index[..., None] >= 0, positions, -1)
        with_lse = resolve(options["normalizer"]).has_log_sum_exp
        results: Any = decode_attention(
            query,
            gathered(key, some),
            gathered(value, some),
            key_positions=positions.reshape(B, K, -1),
            bias=bias,
            return_residual=with_lse,
            **options,
        )
        return results if with_lse else (results, None)
