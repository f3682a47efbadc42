"""Where in a prompt the sink tokens are: found by running the model, then pinned in its cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from sinkjax.cache import Cache, on_host
from sinkjax.ops import sink_detection as formulas
from sinkjax.stream.structure import Structure, split

Method = Literal["attention", "norm", "hidden", "channel"]
METHODS: tuple[Method, ...] = get_args(Method)
THRESHOLDS: dict[str, float] = {
    "attention": formulas.MASS_EPSILON,
    "norm": formulas.OUTLIER_RATIO,
    "hidden": formulas.OUTLIER_RATIO,
    "channel": formulas.OUTLIER_RATIO,
}
SHORTEST = 64
"""Tokens of the smallest piece: prompts of any length up to it share a compiled program."""


def detect_sinks(
    model: Any,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    method: Method | str = "attention",
    threshold: float | None = None,
    max_sink_tokens: int = 4,
) -> Int[np.ndarray, "B P"]:
    """Positions of the sink tokens of each row, wherever in the text they are.

    The model runs over the text without a cache, in pieces of at most its context length. Every piece
    but the first is led by the sinks found so far (by the first token where there is none), so that
    its own first token does not become one. Methods:

    - ``"attention"``: attention received, a mean over layers, heads and the queries that see the
      token. It asks for nothing but a sink, and needs some tokens after it to tell.
    - ``"norm"``: the largest input of a down projection over its median along the text (PrefixQuant).
    - ``"hidden"``: the same of the residual stream after each layer.
    - ``"channel"``: the stable outlier channels of the residual stream, at the layer where they
      emerge (KVSink).

    The last three see sinks that come with outliers. A model trained without those has none.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        tokens: [B, T] ids.
        lengths: [B], how many tokens of each row count; None is all.
        method: see above.
        threshold: scores above it are sinks; None is the method's own, see `sinkjax.ops.sink_detection`.
        max_sink_tokens: P, the most per row: those with the highest scores.

    Returns:
        [B, P] int32, ascending in each row, then −1.

    Raises:
        ValueError: an unknown method, tokens or lengths that do not fit, or "norm" with experts, of
            which each has a down projection.

    Source: Su et al. 2025 (KVSink), arXiv 2508.04257; Chen et al. 2024 (PrefixQuant), arXiv
        2410.05265; Gu et al. 2024, arXiv 2410.10781.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "norm" and getattr(getattr(model, "config", None), "num_experts", 0):
        raise ValueError("method: expected another than 'norm' for a mixture of experts")
    if max_sink_tokens < 1:
        raise ValueError(f"max_sink_tokens: expected at least 1, got {max_sink_tokens}")
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"tokens: expected [B, T] with T > 0, got {ids.shape}")
    B, T = ids.shape
    counts = np.full(B, T) if lengths is None else np.asarray(lengths)
    if counts.shape != (B,) or counts.min() < 0 or counts.max() > T:
        raise ValueError(f"lengths: expected {B} numbers of 0 to T={T}, got {counts.tolist()}")
    bound = THRESHOLDS[method] if threshold is None else threshold
    longest = int(counts.max())
    context = getattr(getattr(model, "config", None), "context_length", None) or longest
    if longest > context and max_sink_tokens >= context:
        raise ValueError(
            f"max_sink_tokens: expected less than the context length of {context}, got "
            f"{max_sink_tokens}"
        )
    size = min(context, max(SHORTEST, 1 << (longest - 1).bit_length()))
    scorer = _Scorer(model, method)
    found: list[list[tuple[float, int]]] = [[] for _ in range(B)]
    start = 0
    while start < longest:
        # The first piece has no lead; all later ones leave room for the same number of tokens.
        room = size if start == 0 else size - max_sink_tokens
        rows, positions = np.zeros((B, size), np.int32), np.full((B, size), -1, np.int32)
        leads = []
        for b in range(B):
            part = ids[b, start : min(start + room, int(counts[b]))]
            lead = ids[b, _best(found[b], max_sink_tokens) or [0]] if start else part[:0]
            leads.append(len(lead))
            if part.size:
                whole = np.concatenate([lead, part])
                rows[b, : whole.size], positions[b, : whole.size] = whole, np.arange(whole.size)
        scores = scorer(rows, positions)
        for b in range(B):
            mine = scores[b, leads[b] : leads[b] + max(int(counts[b]) - start, 0)][:room]
            hits = np.flatnonzero(mine > bound)
            found[b] += [(float(mine[i]), start + int(i)) for i in hits]
        start += room
    result = np.full((B, max_sink_tokens), -1, np.int32)
    for b in range(B):
        best = _best(found[b], max_sink_tokens)
        result[b, : len(best)] = best
    return result


def pinned(
    model: Any,
    cache: Cache,
    tokens: ArrayLike | Sequence[Sequence[int]],
    *,
    lengths: ArrayLike | Sequence[int] | None = None,
    method: Method | str = "attention",
    threshold: float | None = None,
) -> Cache:
    """The cache with the sinks of the text it is about to take pinned, if it has slots for pins.

    Slots for which there is no sink hold the first tokens of the text, as in StreamingLLM: they cost
    nothing, and a prompt may be too short to tell. Any other cache comes back as it is, and so does
    one whose rows have begun.

    Args: as `detect_sinks`; P is the number of the cache's slots for pins.
    """
    slots = cache.num_pins
    if slots == 0 or on_host(cache.time).max() > 0:
        return cache
    found = detect_sinks(
        model, tokens, lengths=lengths, method=method, threshold=threshold, max_sink_tokens=slots
    )
    pins = []
    for row in found:
        sinks = row[row >= 0].tolist()
        first = [position for position in range(slots) if position not in sinks]
        pins.append(sorted(sinks + first[: slots - len(sinks)]))
    return cache.pin(np.asarray(pins, np.int32))


def _best(found: list[tuple[float, int]], most: int) -> list[int]:
    """The positions with the highest scores, ascending; of equal scores the first."""
    return sorted(position for _, position in sorted(found, key=lambda x: (-x[0], x[1]))[:most])


@dataclasses.dataclass
class _Scorer:
    """Scores [B, T] of a piece; of channels it remembers what earlier pieces showed."""

    model: Any
    method: str
    peaks: Any = None

    def __call__(self, rows, positions) -> np.ndarray:
        structure, leaves = split(self.model)
        arrays = leaves, rows, positions
        if self.method != "channel":
            return np.asarray(_scores(structure, self.method)(*arrays))
        peaks = _peaks(structure)(*arrays)
        self.peaks = peaks if self.peaks is None else jnp.maximum(self.peaks, peaks)
        channels = formulas.stable_channels(self.peaks)
        layer = int(formulas.emergence_layer(self.peaks, channels))
        if layer == self.peaks.shape[0]:
            return np.zeros(rows.shape, np.float32)
        return np.asarray(_channel_scores(structure, layer)(*arrays, channels))


@functools.lru_cache(maxsize=16)
def _scores(structure: Structure, method: str) -> Callable:
    def run(arrays, tokens, positions):
        model = structure.model(arrays)
        real, x = positions >= 0, model.embed(tokens)
        found: list[Any] = []
        for index in range(model.config.num_layers):
            block = model.layer(index)
            if method == "attention":
                x, _, reduced = block(x, positions=positions, statistics=True)
                found.append((reduced["key_mass"], reduced["key_count"]))
            elif method == "hidden":
                x, _, _ = block(x, positions=positions)
                found.append(formulas.outlier_scores(x, real))
            else:
                x, inner = _with_down_input(block, x, positions)
                found.append(formulas.outlier_scores(inner, real))
        stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *found)
        return formulas.mass_scores(*stacked) if method == "attention" else stacked.max(0)

    return structure.jit(run)


@functools.lru_cache(maxsize=16)
def _peaks(structure: Structure) -> Callable:
    def run(arrays, tokens, positions):
        model = structure.model(arrays)
        x, found = model.embed(tokens), []
        for index in range(model.config.num_layers):
            x, _, _ = model.layer(index)(x, positions=positions)
            found.append(formulas.channel_peaks(x, positions >= 0))
        return jnp.stack(found)

    return structure.jit(run)


@functools.lru_cache(maxsize=16)
def _channel_scores(structure: Structure, layer: int) -> Callable:
    def run(arrays, tokens, positions, channels):
        model = structure.model(arrays)
        x = model.embed(tokens)
        for index in range(layer + 1):
            x, _, _ = model.layer(index)(x, positions=positions)
        return formulas.channel_scores(x, channels, positions >= 0)

    return structure.jit(run)


def _with_down_input(block: Any, x: Any, positions: Any) -> tuple[Any, Any]:
    """The output of a block, and what its down projection was given."""

    def call(block, x):
        return block(x, positions=positions)[0]

    end, found = nnx.capture(call, nnx.Intermediate)(block, x)
    middle = nnx.to_pure_dict(found)["residual_attention"]
    middle = middle[0] if isinstance(middle, tuple) else middle
    inner = middle if block.config.norm_placement == "post" else block.mlp_norm(middle)
    return end, block.mlp.inside(inner)
