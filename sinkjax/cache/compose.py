"""Caches made of caches: a description for each layer, or for each group of key/value heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sinkjax.cache.descriptions import Description
from sinkjax.cache.store import Chunk, Finish, LayerSpec, LayerView, Layout, Pool, Store
from sinkjax.ops.slots import Slots


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Layer l keeps what `layers[l]` says.

    One wants it because layers differ: those that only look at sinks and recent tokens need no more.

    Args:
        layers: as many as the model has layers.
    """

    layers: tuple[Description, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("PerLayer.layers: expected a description per layer, got none")

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        if num_layers != len(self.layers):
            raise ValueError(
                f"PerLayer.layers: expected one per layer, {num_layers}, got {len(self.layers)}"
            )
        return self.layers[layer].store(spec, layer, num_layers)


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Groups of key/value heads, each with a cache of its own size: memory is really saved.

    Args:
        groups: (heads, description) pairs; every key/value head of the layer is in one of them.

    Source: the deployment of Xiao et al. 2024 (DuoAttention), arXiv 2410.10819.
    """

    groups: tuple[tuple[tuple[int, ...], Description], ...]

    def __post_init__(self) -> None:
        if not self.groups or not all(heads for heads, _ in self.groups):
            raise ValueError(f"PerHead.groups: expected groups of heads, got {self.groups!r}")

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        found = sorted(head for heads, _ in self.groups for head in heads)
        if found != list(range(spec.num_kv_heads)):
            raise ValueError(
                f"PerHead.groups: expected each of the {spec.num_kv_heads} key/value heads of layer "
                f"{layer} once, got {found}"
            )
        parts = []
        for heads, description in self.groups:
            part = _part(spec, heads)
            parts.append((heads, description.store(part, layer, num_layers)))
        return HeadGroups(tuple(parts))


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """The stores of a layer's groups of heads; itself a `Store`, whose state is a tuple of theirs."""

    groups: tuple[tuple[tuple[int, ...], Store], ...]

    @property
    def capacity(self) -> int:
        return max(store.capacity for _, store in self.groups)

    @property
    def limit(self) -> int | None:
        return min((s.limit for _, s in self.groups if s.limit is not None), default=None)

    @property
    def position_cap(self) -> int | None:
        caps = [store.position_cap for _, store in self.groups]
        return None if None in caps else max(cap for cap in caps if cap is not None)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(layout for _, store in self.groups for layout in store.layouts)

    def empty(self, spec: LayerSpec, batch_size: int, dtype: DTypeLike) -> tuple[Any, ...]:
        return tuple(
            store.empty(_part(spec, heads), batch_size, dtype) for heads, store in self.groups
        )

    def extend(self, view: LayerView, chunk: Chunk) -> tuple[Pool, Finish]:
        raise TypeError("groups of heads have no pool in common: `attend_groups`")

    def views(self, view: LayerView) -> list[LayerView]:
        """What each group attends to."""
        found, begin = [], 0
        for (heads, store), state in zip(self.groups, view.state, strict=True):
            positions = view.positions[begin : begin + len(store.layouts)]
            begin += len(store.layouts)
            found.append(LayerView(state, positions, store, _part(view.spec, heads), view.dtype))
        return found


def attend_groups(
    attend: Callable[..., tuple[Any, Any]],
    view: LayerView,
    query,
    key,
    value,
    positions,
    *,
    sinks=None,
    normalizer_params: Mapping[str, Any] | None = None,
    slots: Slots | None = None,
    position_bias: Callable[[Any], Any] | None = None,
    log_forget=None,
    differential: bool = False,
    **options: Any,
) -> tuple[Any, tuple[Any, ...]]:
    """`attend` for each group of heads, with what belongs to its heads; outputs in their order.

    Raises:
        ValueError: differential attention, whose heads come in pairs.
    """
    store: Any = view.store
    if differential:
        raise ValueError("differential: heads come in pairs, a cache with groups of heads has none")
    N, K = query.shape[2], key.shape[2]
    outs, states, order = [], [], []
    for (heads, _), part in zip(store.groups, store.views(view), strict=True):
        kv = np.asarray(heads)
        mine = (kv[:, None] * (N // K) + np.arange(N // K)).reshape(-1)
        out, state = attend(
            part,
            query[:, :, mine],
            key[:, :, kv],
            value[:, :, kv],
            positions,
            sinks=None if sinks is None else sinks[..., mine] if sinks.ndim == 3 else sinks[mine],
            normalizer_params=normalizer_params and jax.tree.map(_take(mine), normalizer_params),
            slots=slots and jax.tree.map(_take(kv), slots),
            position_bias=position_bias and _bias_of(position_bias, mine, N),
            log_forget=None if log_forget is None else log_forget[..., mine],
            **options,
        )
        outs.append(out)
        states.append(state)
        order.extend(mine)
    return jnp.concatenate(outs, axis=2)[:, :, np.argsort(order)], tuple(states)


def _take(heads: np.ndarray) -> Callable[[Any], Any]:
    return lambda leaf: leaf[heads]


def _part(spec: LayerSpec, heads: tuple[int, ...]) -> LayerSpec:
    """The layer as a group of its heads sees it."""

    def share(count: int) -> int:
        return count * len(heads) // spec.num_kv_heads

    return dataclasses.replace(
        spec,
        num_kv_heads=len(heads),
        num_forget_heads=share(spec.num_forget_heads),
        num_heads=None if spec.num_heads is None else share(spec.num_heads),
    )


def _bias_of(position_bias: Callable[[Any], Any], mine: np.ndarray, num_heads: int):
    """The logit bias of some heads, out of that of all."""

    def bias(distance):
        if distance.shape[1] > 1:  # a distance per head: the others' do not matter
            B, _, T, S = distance.shape
            distance = jnp.zeros((B, num_heads, T, S), distance.dtype).at[:, mine].set(distance)
        found = position_bias(distance)
        return found if found.shape[1] == 1 else found[:, mine]

    return bias
