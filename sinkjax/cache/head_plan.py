"""Which heads look far back and which only stream: what classifying writes and caches read."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sinkjax.cache.compose import PerHead, PerLayer
from sinkjax.cache.descriptions import Full, SinkWindow
from sinkjax.files import write_whole
from sinkjax.strict_json import from_json, plain, to_json


@dataclasses.dataclass(frozen=True)
class HeadPlan:
    """A class for every key/value head of a model: *retrieval* keeps all tokens, *streaming* few.

    A streaming head keeps the first P tokens and the last W at their own positions, as it had them
    when it was classified; so the texts may not be longer than the model's context length.

    One wants it because few heads use what lies far back: the others need no memory of it, and
    what they compute hardly changes.

    Args:
        retrieval: per layer and key/value head, True for a retrieval head; L rows of K.
        num_sink_tokens, window: P and W of the streaming heads.
        method: how the classes were found, in a word.
        settings: what that method was told, anything that JSON can hold.
        scores: the numbers the classes were cut from, like `retrieval`, None for a head that was not
            asked; empty when there were none.

    Raises:
        ValueError: layers of different sizes or none, scores of another shape, or a P or W that
            `SinkWindow` does not take.

    Source: Xiao et al. 2024 (DuoAttention), arXiv 2410.10819; P and W as deployed there.

    Example:
        >>> plan = HeadPlan.from_scores([[0.9, 0.1], [0.2, 0.3]], sparsity=0.75, window=60)
        >>> plan.retrieval
        ((True, False), (False, False))
        >>> plan.share(1024)  # of the slots of a full cache: 1 head of 1024 and 3 of 124
        0.3408203125
    """

    retrieval: tuple[tuple[bool, ...], ...]
    num_sink_tokens: int = 64
    window: int = 256
    method: str = "given"
    settings: dict = dataclasses.field(default_factory=dict, hash=False)
    scores: tuple[tuple[float | None, ...], ...] = ()

    def __post_init__(self) -> None:
        sizes = [len(heads) for heads in self.retrieval]
        if not sizes or len(set(sizes)) > 1 or sizes[0] == 0:
            raise ValueError(
                f"retrieval: expected layers of one number of heads, got layers of {sizes} heads"
            )
        if self.scores and [len(row) for row in self.scores] != sizes:
            raise ValueError(
                f"scores: expected {len(sizes)} layers of {sizes[0]} heads, "
                f"got layers of {[len(row) for row in self.scores]} heads"
            )
        # As they come back from a file, so that a plan that was saved is equal to itself.
        object.__setattr__(self, "settings", plain(self.settings))
        self.streaming  # noqa: B018 (checks P and W)

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        num_sink_tokens: int = 64,
        window: int = 256,
        method: str = "scores",
        settings: dict | None = None,
    ) -> "HeadPlan":
        """The heads of the highest scores retrieve.

        Args:
            scores: [L, K], such as the gates of `sinkjax.adapt.train_head_gates` or the mass of
                `sinkjax.adapt.outside_mass`; NaN for a head that was not asked, in a layer whose own
                window is as short: it streams and counts for nothing.
            sparsity: share of streaming heads among those asked, to the nearest head; of equal
                scores those of the first layers stream. 0.5 when neither is given; the paper takes
                0.5 with grouped keys and 0.75 without.
            threshold: instead of it, the lowest score of a retrieval head.
            num_sink_tokens, window, method, settings: of the plan.

        Raises:
            ValueError: scores that are not [L, K], both sparsity and threshold, or a sparsity
                outside [0, 1].
        """
        found = np.asarray(scores, np.float64)
        if found.ndim != 2 or found.size == 0:
            raise ValueError(f"scores: expected [L, K], got shape {found.shape}")
        if sparsity is not None and threshold is not None:
            raise ValueError(
                f"sparsity, threshold: expected one of them, got {sparsity} and {threshold}"
            )
        asked = ~np.isnan(found)
        if threshold is not None:
            retrieval = asked & (found >= threshold)
        else:
            sparsity = 0.5 if sparsity is None else sparsity
            if not 0 <= sparsity <= 1:
                raise ValueError(f"sparsity: expected a number from 0 to 1, got {sparsity}")
            order = np.argsort(found, axis=None, kind="stable")[: asked.sum()]  # NaN sorts last
            retrieval = np.zeros(found.shape, bool)
            retrieval.flat[order[round(sparsity * len(order)) :]] = True
        cut = {"sparsity": sparsity} if threshold is None else {"threshold": threshold}
        return cls(
            retrieval=_rows(retrieval),
            num_sink_tokens=num_sink_tokens,
            window=window,
            method=method,
            settings=(settings or {}) | cut,
            scores=tuple(
                tuple(None if np.isnan(x) else float(x) for x in layer) for layer in found
            ),
        )

    @classmethod
    def from_lazy_layers(
        cls,
        lazy: Sequence[bool] | np.ndarray,
        num_kv_heads: int,
        *,
        num_sink_tokens: int = 4,
        window: int = 1024,
        settings: dict | None = None,
    ) -> "HeadPlan":
        """All heads of a lazy layer stream, all heads of the others retrieve.

        A layer is lazy when its last queries put nearly all of their mass on the first and the
        latest tokens: `sinkjax.adapt.outside_mass(...).mean(axis=1) < 0.1`, for example.

        Args:
            lazy: per layer.
            num_kv_heads: K.
            num_sink_tokens, window, settings: of the plan.

        Source: Zhang et al. 2024 (SimLayerKV), arXiv 2410.13846, with its 4 + 1024 tokens.
        """
        retrieval = np.repeat(~np.asarray(lazy, bool)[:, None], num_kv_heads, axis=1)
        return cls(_rows(retrieval), num_sink_tokens, window, "lazy_layers", settings or {})

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return len(self.retrieval[0])

    @property
    def sparsity(self) -> float:
        """Share of the heads that stream."""
        return 1 - sum(map(sum, self.retrieval)) / (self.num_layers * self.num_kv_heads)

    @property
    def streaming(self) -> SinkWindow:
        """What a streaming head keeps."""
        return SinkWindow(self.num_sink_tokens, self.window, "absolute")

    def share(self, length: int) -> float:
        """Slots of this plan over those of a full cache for texts of `length` tokens."""
        return 1 - self.sparsity * (1 - self.streaming.capacity / length)

    def description(self, length: int) -> PerLayer:
        """What `model.init_cache` takes, for texts of at most `length` tokens.

        Args:
            length: slots of a retrieval head.
        """
        kinds = {True: Full(length), False: self.streaming}

        def of_layer(retrieval: tuple[bool, ...]) -> PerHead | Full | SinkWindow:
            heads = {
                kind: tuple(k for k, found in enumerate(retrieval) if found == kind)
                for kind in kinds
                if kind in retrieval
            }
            if len(heads) == 1:
                return kinds[retrieval[0]]
            return PerHead(tuple((heads[kind], kinds[kind]) for kind in kinds))

        return PerLayer(tuple(map(of_layer, self.retrieval)))

    def check(self, num_layers: int, num_kv_heads: int) -> "HeadPlan":
        """The plan itself, if it is one for a model of this shape.

        Raises:
            ValueError: it is for another one.
        """
        if (num_layers, num_kv_heads) != (self.num_layers, self.num_kv_heads):
            raise ValueError(
                f"head plan: expected one for {num_layers} layers of {num_kv_heads} key/value "
                f"heads, got one for {self.num_layers} layers of {self.num_kv_heads}"
            )
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all.

        Raises:
            OSError: it cannot be written; an older file is untouched.
        """
        return write_whole(path, to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadPlan":
        """A plan that `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a plan; names the file and the field.
        """
        text = Path(path).read_text(encoding="utf-8")
        return from_json(cls, text, name=os.fspath(path))


def _rows(retrieval: np.ndarray) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(map(bool, layer)) for layer in retrieval)
