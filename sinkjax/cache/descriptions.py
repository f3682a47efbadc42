"""What a cache keeps: the descriptions that a user writes, and the rings that two of them are."""

import dataclasses
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

from sinkjax.cache.ring_store import Ring
from sinkjax.cache.store import LayerSpec, Store, at_least

PositionMode: TypeAlias = Literal["cache_relative", "absolute"]


@runtime_checkable
class Description(Protocol):
    """What a cache keeps; frozen and hashable."""

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        """How this layer keeps it."""
        ...


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

    Sinks elsewhere: with `num_sink_tokens="auto"` the P = `max_sink_tokens` sink slots are for the
    tokens that `Cache.pin` names before they come (`stream.generate` finds them in the prompt); those
    not named are empty. A pinned token is never evicted. As long as it is in the window it is a token
    like any other, at its distance. After that it is, for slot j,

    - in `absolute` at its distance t − p still;
    - in `cache_relative` C − 1 − j away, where StreamingLLM has its sink j. One of the first P tokens
      stays min(t, C − 1) − p away, so that pins at 0 … P − 1 are StreamingLLM.

    Args:
        num_sink_tokens: P, at least 0, or "auto".
        window: W, at least 1.
        position_mode: one of the two above.
        max_sink_tokens: P of "auto", at least 1; by default as many as StreamingLLM keeps.

    Source: Xiao et al. 2023, arXiv 2309.17453; the defaults are 4 + 1020 as in their appendix.
    """

    num_sink_tokens: int | Literal["auto"] = 4
    window: int = 1020
    position_mode: PositionMode = "cache_relative"
    max_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if self.num_sink_tokens != "auto":
            at_least("SinkWindow.num_sink_tokens", self.num_sink_tokens, 0)
        at_least("SinkWindow.max_sink_tokens", self.max_sink_tokens, 1)
        at_least("SinkWindow.window", self.window, 1)
        if self.position_mode not in get_args(PositionMode):
            raise ValueError(
                f"SinkWindow.position_mode: expected one of {', '.join(get_args(PositionMode))}, "
                f"got {self.position_mode!r}"
            )

    @property
    def capacity(self) -> int:
        """C = P + W, in tokens."""
        return self.sink_slots + self.window

    @property
    def sink_slots(self) -> int:
        """P, found or given."""
        return self.max_sink_tokens if self.num_sink_tokens == "auto" else self.num_sink_tokens

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Ring:
        """A layer whose own window fits in the cache keeps its trained mask, others get this one.

        `cache_relative` holds sinks at the distance of the *description's* C − 1 in every layer,
        also in those with a smaller ring: before t = C − 1 the whole model is then the trained one.
        """
        own = trained_window(spec, self.window)
        window = self.window if own is None else own
        sinks = self.sink_slots if own is None else spec.num_sink_tokens
        cap = None
        if self.position_mode == "cache_relative":
            cap = max(self.capacity, sinks + window) - 1
        if own is None and self.num_sink_tokens == "auto":
            return Ring(sinks, window, window, 0, cap, None, pinned=True)
        return Ring(sinks, window, window, sinks, cap, None)


@dataclasses.dataclass(frozen=True)
class Full:
    """Every token of a text of at most `length` tokens, at its own position; nothing is evicted.

    A token past the length raises `ValueError` on the host and gives NaN inside jit.
    """

    length: int

    def __post_init__(self) -> None:
        at_least("Full.length", self.length, 1)

    @property
    def capacity(self) -> int:
        """The length, in tokens."""
        return self.length

    @property
    def position_mode(self) -> PositionMode:
        return "absolute"

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Ring:
        """A layer with a window of its own needs no more slots than that."""
        own = trained_window(spec, self.length)
        if own is None:
            return Ring(0, self.length, None, 0, None, self.length)
        sinks = spec.num_sink_tokens
        slots = (sinks, own) if sinks + own <= self.length else (0, self.length)
        return Ring(*slots, own, sinks, None, self.length)


def trained_window(spec: LayerSpec, room: int) -> int | None:
    """The window that a layer was trained with, where it fits.

    Such a layer keeps exactly its trained mask, its own sink tokens and no others, whatever the
    description: streaming does not change what it computes, and it needs no more memory than that.
    """
    return spec.window if spec.window is not None and spec.window <= room else None
