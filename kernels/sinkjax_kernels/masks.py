"""Masks as data: which query sees which key, without a [T, S] array.

A key is visible to a query when its position is not negative, both are of one segment, the key is
not later than the query (causal), and the key lies within the window or is a sink token. Kernels read
the fields they can exploit; `visible` gives any rectangle of the mask, `block_table` which
rectangles can be skipped.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_positions",
        "key_positions",
        "query_segment_ids",
        "key_segment_ids",
        "key_is_sink",
        "query_lengths",
        "key_lengths",
    ],
    meta_fields=[
        "is_causal",
        "left",
        "right",
        "excludes_self",
        "in_order",
        "query_start",
        "key_start",
        "num_sink_tokens",
        "same_segments",
    ],
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who sees whom. A leading dimension may be 1 where all rows (or key/value heads) agree.

    Args:
        query_positions: `[B, T]`.
        key_positions: `[B, K, S]`; −1 marks an empty slot.
        query_segment_ids, key_segment_ids: `[B, T]`, `[B, S]`, or None for one segment.
        key_is_sink: `[B, K, S]`, or None when there are no sink tokens.
        query_lengths, key_lengths: `[B]` valid buffer slots, or None for all.
        is_causal: hide keys of later positions.
        left, right: window, in positions before and after the query; None is unbounded.
        excludes_self: hide the key at the query's own position.
        in_order: keys are known to lie in the order of their positions.
        query_start, key_start: slot i is known to be at this position plus i; None where only the
            arrays know.
        num_sink_tokens: sink tokens are known to be those at positions (in segments without
            positions: at indices) below it; None where only `key_is_sink` knows.
        same_segments: queries and keys are known to have the same segment ids.
    """

    # Leaves are `Any`: tree transformations put all sorts of things in the place of arrays.
    query_positions: Any
    key_positions: Any
    query_segment_ids: Any = None
    key_segment_ids: Any = None
    key_is_sink: Any = None
    query_lengths: Any = None
    key_lengths: Any = None
    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    excludes_self: bool = False
    in_order: bool = False
    query_start: int | None = None
    key_start: int | None = None
    num_sink_tokens: int | None = None
    same_segments: bool = False

    @property
    def has_window(self) -> bool:
        return self.left is not None or self.right is not None

    def pad(self, queries: int, keys: int) -> "Visibility":
        """The same mask with `queries` and `keys` more slots that see and show nothing."""

        def widen(x, by, value):
            if x is None or by == 0:
                return x
            return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, by)], constant_values=value)

        return dataclasses.replace(
            self,
            query_positions=widen(self.query_positions, queries, -1),
            key_positions=widen(self.key_positions, keys, -1),
            query_segment_ids=widen(self.query_segment_ids, queries, -1),
            key_segment_ids=widen(self.key_segment_ids, keys, -1),
            key_is_sink=widen(self.key_is_sink, keys, False),
            query_start=self.query_start if queries == 0 else None,
            key_start=self.key_start if keys == 0 else None,
        )

    def rows(self, start, size: int) -> "Visibility":
        """The same mask of `size` queries from `start` on."""

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)

        return dataclasses.replace(
            self,
            query_positions=cut(self.query_positions),
            query_segment_ids=cut(self.query_segment_ids),
            query_lengths=None if self.query_lengths is None else self.query_lengths - start,
            query_start=None,
            same_segments=False,
        )

    def visible(
        self, query_start=0, query_size: int | None = None, key_start=0, key_size: int | None = None
    ) -> Bool[Array, "B K T S"]:
        """A rectangle of the mask, all of it by default; B and K are 1 where all agree."""
        T, S = self.query_positions.shape[-1], self.key_positions.shape[-1]
        rows = T if query_size is None else query_size
        columns = S if key_size is None else key_size

        def queries(x):
            return jax.lax.dynamic_slice_in_dim(x, query_start, rows, axis=-1)

        def keys(x):
            return jax.lax.dynamic_slice_in_dim(x, key_start, columns, axis=-1)

        q = queries(self.query_positions)[:, None, :, None]
        k = keys(self.key_positions)[:, :, None, :]
        seen = jnp.broadcast_to(k >= 0, jnp.broadcast_shapes(q.shape, k.shape))
        if self.is_causal:
            seen &= k <= q
        if self.excludes_self:
            seen &= k != q
        if self.has_window:
            near = jnp.ones_like(seen)
            if self.left is not None:
                near &= q - k <= self.left  # a difference: a sum could pass int32
            if self.right is not None:
                near &= k - q <= self.right
            if self.key_is_sink is not None:
                near |= keys(self.key_is_sink)[:, :, None, :]
            seen &= near
        if self.query_segment_ids is not None and self.key_segment_ids is not None:
            same = (
                queries(self.query_segment_ids)[:, :, None] == keys(self.key_segment_ids)[:, None]
            )
            seen &= same[:, None]
        if self.query_lengths is not None:
            slots = query_start + jnp.arange(rows)
            seen &= (slots < self.query_lengths[:, None])[:, None, :, None]
        if self.key_lengths is not None:
            slots = key_start + jnp.arange(columns)
            seen &= (slots < self.key_lengths[:, None])[:, None, None, :]
        return seen

    def block_table(self, block_q: int, block_k: int) -> Bool[Array, "Tb Sb"]:
        """Which blocks may hold a visible pair, from the extent of positions and segments in each.

        Conservative: False is certain. T and S must be multiples of the block sizes. Costs
        O(T/block_q * S/block_k) memory; sound for any order of positions in the buffers.
        """
        big = jnp.iinfo(jnp.int32).max
        q = _blocks(self.query_positions.astype(jnp.int32), block_q)[:, None]  # [B, 1, Tb, bq]
        k = _blocks(self.key_positions.astype(jnp.int32), block_k)  # [B, K, Sb, bk]
        valid = k >= 0
        q_low, q_high = q.min(-1)[..., :, None], q.max(-1)[..., :, None]
        k_low = jnp.where(valid, k, big).min(-1)[..., None, :]
        k_high = k.max(-1)[..., None, :]
        seen = jnp.broadcast_to(
            valid.any(-1)[..., None, :], jnp.broadcast_shapes(q_low.shape, k_low.shape)
        )
        if self.is_causal:
            seen &= k_low <= q_high
        if self.has_window:
            near = jnp.ones_like(seen)
            if self.left is not None:
                near &= q_low - k_high <= self.left
            if self.right is not None:
                near &= k_low - q_high <= self.right
            if self.key_is_sink is not None:
                near |= _blocks(self.key_is_sink, block_k).any(-1)[..., None, :]
            seen &= near
        if self.query_segment_ids is not None and self.key_segment_ids is not None:
            a = _blocks(self.query_segment_ids, block_q)[:, None]
            b = _blocks(self.key_segment_ids, block_k)[:, None]
            seen &= a.min(-1)[..., :, None] <= b.max(-1)[..., None, :]
            seen &= b.min(-1)[..., None, :] <= a.max(-1)[..., :, None]
        if self.query_lengths is not None:
            starts = jnp.arange(q.shape[-2]) * block_q
            seen &= (starts < self.query_lengths[:, None])[:, None, :, None]
        if self.key_lengths is not None:
            starts = jnp.arange(k.shape[-2]) * block_k
            seen &= (starts < self.key_lengths[:, None])[:, None, None, :]
        return seen.any(axis=(0, 1))


def build(
    sizes: tuple[int, int, int, int],
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    num_sink_tokens: int = 0,
    key_is_sink=None,
    query_positions=None,
    key_positions=None,
    query_segment_ids=None,
    key_segment_ids=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
) -> Visibility:
    """A `Visibility` from the arguments of `sinkjax.dot_product_attention`, checked.

    Args:
        sizes: B, T, S, K.
        local_window_size: `(left, right)` without the query itself; an int n is (n, n).
        num_sink_tokens: keys whose given position (with segments and no positions: whose index
            within the segment) is below it are sink tokens, unless `key_is_sink` says which are.
        query_positions, key_positions: consecutive ones are best given as NumPy arrays, whose values
            are known while tracing: kernels then need not read them.
        query_segment_ids, key_segment_ids: best one and the same array, for the same reason. Equal
            ids are adjacent: a segment is a run of them.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    B, T, S, K = sizes
    if num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens: expected at least 0, got {num_sink_tokens}")
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("query_segment_ids and key_segment_ids: expected both or neither")
    size = local_window_size
    left, right = size if isinstance(size, tuple) else (size, size)
    if any(bound is not None and bound < 0 for bound in (left, right)):
        raise ValueError(f"local_window_size: expected numbers of at least 0, got {size}")
    positions_q = _row("query_positions", query_positions, B, T)
    if positions_q is None:
        positions_q = jnp.arange(T, dtype=jnp.int32)[None]
    same_segments = query_segment_ids is key_segment_ids is not None
    segments_k = _row("key_segment_ids", key_segment_ids, B, S)
    positions_k = _per_head("key_positions", key_positions, B, S, K)
    is_sink = _per_head("key_is_sink", key_is_sink, B, S, K)
    if positions_k is not None:
        index = positions_k
    else:
        positions_k = index = jnp.arange(S, dtype=jnp.int32)[None, None]
        if segments_k is not None:
            index = index_within_segment(segments_k)[:, None]
    # With segments, given positions decide instead of the index that kernels could count.
    by_position = bool(num_sink_tokens) and segments_k is not None and key_positions is not None
    by_array = is_sink is not None or by_position
    if is_sink is None and num_sink_tokens > 0:
        is_sink = index < num_sink_tokens
    return Visibility(
        query_positions=positions_q,
        key_positions=positions_k,
        query_segment_ids=_row("query_segment_ids", query_segment_ids, B, T),
        key_segment_ids=segments_k,
        key_is_sink=is_sink,
        query_lengths=_lengths("query_seq_lengths", query_seq_lengths, B),
        key_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, B),
        is_causal=bool(is_causal),
        left=left,
        right=right,
        in_order=key_positions is None,
        query_start=_start(query_positions),
        key_start=_start(key_positions),
        num_sink_tokens=None if by_array else num_sink_tokens,
        same_segments=same_segments,
    )


def _start(positions) -> int | None:
    """The first of consecutive positions, where that can be known while tracing."""
    if positions is None:
        return 0
    if not isinstance(positions, np.ndarray) or positions.size == 0:
        return None
    first = int(positions.flat[0])
    consecutive = first >= 0 and (positions == first + np.arange(positions.shape[-1])).all()
    return first if consecutive else None


def _row(name: str, x, batch: int, length: int) -> Array | None:
    """Positions or segments as [1 or B, length]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name}: expected {[length]} or {[batch, length]}, got {list(x.shape)}")
    return x[None] if x.ndim == 1 else x


def _per_head(name: str, x, batch: int, length: int, heads: int) -> Array | None:
    """Positions or flags of keys as [1 or B, 1 or K, length]."""
    if x is None or jnp.ndim(x) < 3:
        x = _row(name, x, batch, length)
        return None if x is None else x[:, None]
    x = jnp.asarray(x)
    if (
        x.ndim != 3
        or x.shape[0] not in (1, batch)
        or x.shape[1:] not in ((1, length), (heads, length))
    ):
        raise ValueError(f"{name}: expected {[batch, heads, length]}, got {list(x.shape)}")
    return x


def _lengths(name: str, x, batch: int) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name}: expected {batch} integers, got {x.dtype}{list(x.shape)}")
    return x


def index_within_segment(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Slots since the segment began; a segment is a run of equal ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def _blocks(x: Array, size: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, size)
