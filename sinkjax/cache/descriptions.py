"""What a cache keeps, what a layer was trained with, and the plan that follows from both."""

import dataclasses
from typing import Literal, TypeAlias, get_args

PositionMode: TypeAlias = Literal["cache_relative", "absolute"]


@dataclasses.dataclass(frozen=True)
class SinkWindow:
    """The first P tokens and the last W, the token itself included: C = P + W slots for ever.

    Position modes (RoPE):

    - ``cache_relative``: StreamingLLM. Sink j stays C − 1 − j away once the stream is longer than
      the cache, so a pre-trained model never meets a distance it was not trained on. Needs C ≤
      the model's context length.
    - ``absolute``: every token keeps its position in the text. Right for a model that was trained
      with this mask and for streams no longer than its RoPE was trained on.

    Both are the same until t = C − 1.

    Args:
        num_sink_tokens: P, at least 0.
        window: W, at least 1.
        position_mode: one of the two above.

    Source: Xiao et al. 2023, arXiv 2309.17453; the defaults are 4 + 1020 as in their appendix.
    """

    num_sink_tokens: int = 4
    window: int = 1020
    position_mode: PositionMode = "cache_relative"

    def __post_init__(self) -> None:
        _at_least("SinkWindow.num_sink_tokens", self.num_sink_tokens, 0)
        _at_least("SinkWindow.window", self.window, 1)
        if self.position_mode not in get_args(PositionMode):
            raise ValueError(
                f"SinkWindow.position_mode: expected one of {', '.join(get_args(PositionMode))}, "
                f"got {self.position_mode!r}"
            )

    @property
    def capacity(self) -> int:
        """C = P + W, in tokens."""
        return self.num_sink_tokens + self.window


@dataclasses.dataclass(frozen=True)
class Full:
    """Every token of a text of at most `length` tokens, at its own position; nothing is evicted.

    A token past the length raises `ValueError` on the host and gives NaN inside jit.
    """

    length: int

    def __post_init__(self) -> None:
        _at_least("Full.length", self.length, 1)

    @property
    def capacity(self) -> int:
        """The length, in tokens."""
        return self.length

    @property
    def position_mode(self) -> PositionMode:
        return "absolute"


Description: TypeAlias = SinkWindow | Full


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The shape of a layer's keys and the mask it was trained with.

    Args:
        num_kv_heads, head_dim: K and H.
        window: keys seen back in training, the query's own included; None is all.
        num_sink_tokens: sink tokens exempt from that window in training.
        num_forget_heads: N, query heads with a forget gate, whose decay is kept per slot; 0: none.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    num_sink_tokens: int = 0
    num_forget_heads: int = 0

    def __post_init__(self) -> None:
        _at_least("LayerSpec.num_kv_heads", self.num_kv_heads, 1)
        _at_least("LayerSpec.head_dim", self.head_dim, 1)
        _at_least("LayerSpec.num_sink_tokens", self.num_sink_tokens, 0)
        _at_least("LayerSpec.num_forget_heads", self.num_forget_heads, 0)
        if self.window is not None:
            _at_least("LayerSpec.window", self.window, 1)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Layout and mask of one layer's cache.

    Position p lives in slot p below `sink_slots`, and in slot `sink_slots + (p − sink_slots) mod
    ring_slots` above. The mask is `window` and `num_sink_tokens` as in `ops.decode_attention`.

    Args:
        sink_slots, ring_slots: their sum is the layer's capacity.
        window, num_sink_tokens: the mask; None is unbounded.
        position_cap: the largest position at which a query meets the sink slots; None: its own.
        limit: first position that does not fit (`Full`), or None.
    """

    sink_slots: int
    ring_slots: int
    window: int | None
    num_sink_tokens: int
    position_cap: int | None
    limit: int | None

    @property
    def capacity(self) -> int:
        return self.sink_slots + self.ring_slots


def plan(description: Description, spec: LayerSpec) -> LayerPlan:
    """How a layer is cached.

    A layer whose own window fits in the cache (W_l ≤ W) keeps exactly its trained mask, its own
    sink tokens and no others: streaming does not change what it computes, and it needs no more
    memory than that. Every other layer gets the description's sink tokens and window.

    `cache_relative` holds sinks at the distance of the *description's* C − 1 in every layer, also
    in those with a smaller ring: before t = C − 1 the whole model is then the trained one.
    """
    own = spec.window is not None and spec.window <= description.capacity
    if isinstance(description, Full):
        sink_slots = spec.num_sink_tokens if own else 0
        ring_slots = spec.window if own and spec.window is not None else description.length
        if sink_slots + ring_slots > description.length:
            sink_slots, ring_slots = 0, description.length
        sinks = spec.num_sink_tokens if own else 0
        window = spec.window if own else None
        return LayerPlan(sink_slots, ring_slots, window, sinks, None, description.length)
    own = spec.window is not None and spec.window <= description.window
    sinks = spec.num_sink_tokens if own else description.num_sink_tokens
    window = spec.window if own and spec.window is not None else description.window
    cap = None
    if description.position_mode == "cache_relative":
        cap = max(description.capacity, sinks + window) - 1
    return LayerPlan(sinks, window, window, sinks, cap, None)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
