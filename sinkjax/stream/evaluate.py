"""Loss along a text, for three ways to look at no more than C tokens."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from sinkjax.cache import PositionMode, SinkWindow
from sinkjax.ops.losses import token_nll
from sinkjax.stream.prefill import take_tokens
from sinkjax.stream.prompt import learned_sink_ids
from sinkjax.stream.score import score
from sinkjax.stream.session import Session
from sinkjax.stream.structure import Structure, split

Policy = Literal["recompute", "window", "sink_window"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one policy paid for each token of a text.

    Args:
        policy: see `evaluate`.
        positions: index in the text of each token that was predicted.
        nll: its negative log-likelihood, in nats.
        cache_bytes: memory of the cache; 0 for recomputation.
        seconds: wall time, compilation included.
    """

    policy: Policy
    positions: Int[np.ndarray, " M"]
    nll: Float[np.ndarray, " M"]
    cache_bytes: int
    seconds: float

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(np.mean(self.nll, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """e to the mean."""
        return float(np.exp(self.mean))

    def summary(self, beyond: int = 0) -> dict[str, Any]:
        """Numbers for a table.

        Args:
            beyond: also give the mean over the tokens from this position on, where the cache has
                begun to evict; NaN when there are none.
        """
        late = self.nll[self.positions >= beyond]
        return {
            "policy": self.policy,
            "tokens": int(self.nll.size),
            "nll": self.mean,
            "perplexity": self.perplexity,
            "nll_beyond": float(np.mean(late, dtype=np.float64)) if late.size else float("nan"),
            "cache_bytes": self.cache_bytes,
            "seconds": self.seconds,
        }


def evaluate(
    model: Any,
    tokens: ArrayLike | Sequence[int],
    *,
    policies: Sequence[Policy] = POLICIES,
    num_sink_tokens: int | Literal["auto"] = 4,
    window: int = 1020,
    position_mode: PositionMode = "cache_relative",
    max_sink_tokens: int = 4,
    lead: Sequence[int] | None = None,
    chunk_size: int = 256,
    every: int = 1,
    batch_size: int = 8,
    progress: Callable[[Policy, int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Teacher-forced loss of each token of a text, far past the context, in constant memory.

    With C = `num_sink_tokens` + `window`, the token is predicted from at most C tokens before it:

    - ``"recompute"``: the last C, encoded anew for each prediction: dense, C forward tokens per
      token. What a streaming cache is measured against.
    - ``"window"``: a cache of the last C and no sink tokens. What collapses once the first tokens
      are evicted.
    - ``"sink_window"``: a cache of the first `num_sink_tokens` and the last `window`.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        tokens: [T] ids, more than one.
        policies: which, in this order.
        num_sink_tokens, window, position_mode, max_sink_tokens: see `sinkjax.cache.SinkWindow`.
        lead: ids put before the text and, for recomputation, at the front of every row in place of
            its oldest tokens (a model trained with BOS needs it there); None: the model's learned
            sink tokens.
        chunk_size: tokens per step of the caches.
        every: recomputation predicts each `every`-th token only; it costs C times as much.
        batch_size: rows per step of recomputation.
        progress: called with policy, tokens done, tokens in all.

    Returns:
        an `Evaluation` per policy. The first token is predicted only when there is a `lead`.

    Raises:
        ValueError: an unknown policy or a text too short.

    Source: Xiao et al. 2023, arXiv 2309.17453, fig. 3: the same three.
    """
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown:
        raise ValueError(f"policies: expected some of {', '.join(POLICIES)}, got {unknown[0]!r}")
    for name, value in (("chunk_size", chunk_size), ("every", every), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    text = np.asarray(tokens)
    if lead is None:
        lead = learned_sink_ids(model)
    if text.ndim != 1 or text.size + len(lead) < 2:
        raise ValueError(f"tokens: expected [T] with at least two ids, got shape {text.shape}")
    sink_window = SinkWindow(num_sink_tokens, window, position_mode, max_sink_tokens)
    slots = sink_window.capacity
    if len(lead) >= slots:
        raise ValueError(f"lead: expected fewer than C={slots} ids, got {len(lead)}")
    prefix = np.asarray(lead, np.int32)
    results: dict[str, Evaluation] = {}
    for policy in policies:
        report = functools.partial(progress, policy) if progress is not None else None
        begin, size = time.perf_counter(), 0
        if policy == "recompute":
            positions, nll = _recompute(model, text, prefix, slots, every, batch_size, report)
        else:
            bare = SinkWindow(0, slots, position_mode)
            description = sink_window if policy == "sink_window" else bare
            positions, nll, size = _cached(model, text, prefix, description, chunk_size, report)
        seconds = time.perf_counter() - begin
        results[policy] = Evaluation(policy, positions, nll, size, seconds)
    return results


def _cached(model, text, prefix, description, chunk_size, report):
    """One pass over the text, behind its lead."""
    session = Session.start(model, description)
    size, lead = session.cache.nbytes, len(prefix)
    total = lead + text.size - 1
    session.cache.require_room(total, at=0)
    nll = []
    for part in score(model, [text], cache=session, lead=prefix.tolist(), chunk_size=chunk_size):
        nll.append(part.nll)
        if report is not None:
            report(part.statistics.position, total)
    return np.arange(0 if lead else 1, text.size), np.concatenate(nll), size


def _recompute(model, text, prefix, slots, every, batch_size, report):
    """Each prediction from a row of its own: the prefix and the last C − len(prefix) tokens."""
    structure, arrays = split(model)
    run = _last_token(structure)
    positions = np.arange(0 if len(prefix) else 1, text.size, every)
    room = slots - len(prefix)
    nll = np.empty(positions.size, np.float32)
    for start in range(0, positions.size, batch_size):
        part = positions[start : start + batch_size]
        rows = np.zeros((batch_size, slots), np.int32)
        last, targets = np.zeros((2, batch_size), np.int32)
        for row, position in enumerate(part):
            history = text[max(position - room, 0) : position]
            length = len(prefix) + len(history)
            rows[row, :length] = np.concatenate([prefix, history])
            last[row], targets[row] = length - 1, text[position]
        losses = run(arrays, rows, last, targets)
        nll[start : start + part.size] = np.asarray(losses)[: part.size]
        if report is not None:
            report(start + part.size, positions.size)
    return positions, nll


@functools.lru_cache(maxsize=16)
def _last_token(structure: Structure) -> Callable:
    def run(arrays, rows, last, targets):
        model = structure.model(arrays)
        # Causal, so what stands behind the last token does not matter.
        hidden = take_tokens(model(rows).hidden, last[:, None, None])
        return token_nll(model.head(hidden)[:, 0], targets)

    return structure.jit(run)
