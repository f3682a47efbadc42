"""How one layer keeps keys and values: what every kind of storage promises to `attend`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from sinkjax.ops.rope import Rope


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The shape of a layer's keys and the mask it was trained with.

    Args:
        num_kv_heads, head_dim: K and H.
        window: keys seen back in training, the query's own included; None is all.
        num_sink_tokens: sink tokens exempt from that window in training.
        num_forget_heads: N, query heads with a forget gate, whose decay is kept per slot; 0: none.
        num_heads: N, query heads; None where nobody asks (storages that keep queries do).
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    num_sink_tokens: int = 0
    num_forget_heads: int = 0
    num_heads: int | None = None

    def __post_init__(self) -> None:
        at_least("LayerSpec.num_kv_heads", self.num_kv_heads, 1)
        at_least("LayerSpec.head_dim", self.head_dim, 1)
        at_least("LayerSpec.num_sink_tokens", self.num_sink_tokens, 0)
        at_least("LayerSpec.num_forget_heads", self.num_forget_heads, 0)
        if self.window is not None:
            at_least("LayerSpec.window", self.window, 1)
        if self.num_heads is not None:
            at_least("LayerSpec.num_heads", self.num_heads, 1)


class Layout(NamedTuple):
    """Which slot a position lives in, as `ring.slots` computes it; layers of one layout share it.

    Position p lives in slot p below `sink_slots`, and in slot `sink_slots + (p − sink_slots) mod
    ring_slots` above; `limit` is the first position that does not fit, or None.

    With `pinned`, the sink slots are for positions given as data, wherever they are in the text, and
    the shared array is a `ring.Pinned`. A pin below `pins_at_once` (None: every pin) goes to its slot
    when it comes, any other lives in the ring like every token and is met in its slot after that.
    """

    sink_slots: int
    ring_slots: int
    limit: int | None
    pinned: bool = False
    pins_at_once: int | None = None


class Chunk(NamedTuple):
    """New tokens of a layer.

    Args:
        key, value: [B, T, K, H], keys rotated at their positions; in the stored dtype, 0 for padding.
        positions: [B, T]; −1 is padding, or a token that does not fit: it is not written.
        faded: [B, T, N] log forget gates summed from the start of the chunk, or None.
        rope: the rotation that keys have been through, or None.
    """

    key: Any
    value: Any
    positions: Any
    faded: Any = None
    rope: Rope | None = None


class Pool(NamedTuple):
    """What a chunk looks at: the old cache and the chunk, in any order.

    Args:
        key, value: [B, K, S, H], finite everywhere.
        positions: [B, S] or [B, K, S]; −1 is empty. A query sees 0 ≤ position ≤ its own.
        sink_slots: how many leading slots are met at min(t, `position_cap`) of the store, and are
            exempt from the window.
        sink_positions: [B, sink_slots], where distances count them if not at their positions.
        num_sink_tokens, window: the mask by position, see `ops.decode_attention`.
        decay: [B, N, S], log gates from a token to the end of the cache before the chunk.
        visible: bool [B, #K, T, S], what the mask by position leaves out besides, or None.
        slot: [B] for T = 1, where the token is still to be written; None: it is in key and value.
        attend: instead of `ops.decode_attention`: called as that, with the query, key and value (those
            above, values widened for differential attention) and its options; gives the output and
            the log-sum-exp, or None where there is none.
    """

    key: Any
    value: Any
    positions: Any
    sink_slots: int = 0
    num_sink_tokens: int = 0
    window: int | None = None
    sink_positions: Any = None
    decay: Any = None
    visible: Any = None
    slot: Any = None
    attend: Callable[..., tuple[Any, Any]] | None = None


class Attended(NamedTuple):
    """What a storage may learn from the attention of its chunk.

    Args:
        query: [B, T, N, H], rotated at its own position.
        sink_query: the same as met by the leading sink slots, or None.
        key, value: leaves of the pool, the token of a `Pool.slot` written.
        scale, logits_soft_cap, rope: of the layer.
    """

    query: Any
    sink_query: Any
    key: Any
    value: Any
    scale: float | None
    logits_soft_cap: float | None
    rope: Rope | None


Finish = Callable[[Attended], Any]
"""Gives a layer's state after its chunk."""


@runtime_checkable
class Store(Protocol):
    """How one layer keeps keys and values; frozen and hashable, static under jit."""

    @property
    def capacity(self) -> int:
        """The most tokens that a query of this layer can look at."""
        ...

    @property
    def limit(self) -> int | None:
        """First position that does not fit, or None."""
        ...

    @property
    def position_cap(self) -> int | None:
        """The largest position at which a query meets the leading sink slots; None: its own."""
        ...

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Shared arrays of positions that it reads; none when they are part of its state."""
        ...

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> Any:
        """The state before the first token: a pytree whose leaves are all [B, ...]."""
        ...

    def extend(self, view: "LayerView", chunk: Chunk) -> tuple[Pool, Finish]:
        """What the chunk looks at, and how its tokens are kept once it has."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "positions"],
    meta_fields=["store", "spec", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class LayerView:
    """What `attend` needs of a cache to serve one layer.

    Args:
        state: of the layer, as its store made it.
        positions: [B, C] int32 for each of the store's layouts.
        store, spec: how it is kept, what it was trained with.
        dtype: of stored keys and values.
    """

    # `Any` in pytrees: their leaves are not always arrays (`jax.eval_shape`, `jax.tree.map`).
    state: Any
    positions: tuple[Any, ...]
    store: Store
    spec: LayerSpec
    dtype: str

    @property
    def capacity(self) -> int:
        """The most tokens that a query of this layer can look at."""
        return self.store.capacity

    @property
    def batch_size(self) -> int:
        """B."""
        leaf: Array = jax.tree.leaves(self.state)[0]
        return leaf.shape[0]


def at_least(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
