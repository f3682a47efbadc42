"""What a stream costs in perplexity: a million tokens, dropped sinks, few bits.

The part of `streaming.py` that trains small models and reads texts with them; it has no command of its
own.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinkjax.cache import Description, SinkWindow
from sinkjax.cache.quantised import Quantised
from sinkjax.cli.record import peak_memory_bytes
from sinkjax.models import preset
from sinkjax.stream.detect import detect_sinks, pinned
from sinkjax.stream.score import score
from sinkjax.stream.session import Session
from sinkjax.train import (
    ByteTokenizer,
    DataConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    backcopy_run,
    fit,
    load_data,
)
from sinkjax.train.backcopy import HELD_OUT_SEED
from sinkjax.train.tasks import BOS_ID, NUM_SYMBOLS, Backcopy

BOS = ByteTokenizer().bos_id
SINKS = (0, 1, 2, 4)


# --- models and texts


@functools.cache
def text_model(folder: Path, steps: int, seed: int, max_bytes: int | None = None) -> Run:
    """Two layers on bytes as in the quickstart, but rows of 256: every one is led by BOS."""
    return _trained(
        RunConfig(
            model=dataclasses.replace(preset("tiny"), context_length=256),
            data=DataConfig(batch_size=4, seed=seed, max_bytes=max_bytes),
            optimizer=OptimizerConfig(
                learning_rate=1e-2, weight_decay=0.3, no_decay=(), schedule="constant"
            ),
            path=str(folder / f"text_{steps}_{seed}"),
            steps=steps,
            seed=seed,
            eval_every=steps,
            eval_batches=4,
            checkpoint_every=steps,
        )
    )


@functools.cache
def backcopy_model(folder: Path, steps: int, seed: int, num_layers: int = 3) -> Run:
    """The toy task whose idle heads rest on BOS: rows of 32, several layers."""
    path = folder / f"backcopy_{num_layers}_{steps}_{seed}"
    run = backcopy_run("softmax", path, seed=seed, steps=steps)
    return _trained(
        dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=num_layers))
    )


def _trained(run: RunConfig) -> Run:
    found = fit(run, progress=False)
    if found.interrupted:
        raise KeyboardInterrupt
    return found


def importance(run: Run) -> float:
    """Attention to BOS, of the layer and head that give it most."""
    last = [row for row in run.metrics if row["split"] == "validation"][-1]
    return float(np.max(last["importance"]))


def held_out_bytes(run: Run, length: int) -> np.ndarray:
    """A passage of validation text, documents one after the other without a BOS between them."""
    shape = run.config.model
    _, batches = _rows(run.config.data, shape.context_length, shape.vocab_size)
    parts, total, index = [], 0, 0
    while total < length:
        tokens = batches[index % max(len(batches), 1)]["tokens"]
        parts.append(tokens[tokens != BOS])
        total, index = total + parts[-1].size, index + 1
    return np.concatenate(parts)[:length]


# Reading and packing takes longer than the rest of a part.
_rows = functools.cache(load_data)


def held_out_symbols(length: int) -> np.ndarray:
    """One long row of the toy task, its BOS left out."""
    return Backcopy(length + 1, HELD_OUT_SEED).rows(np.arange(1))["tokens"][0, 1:]


# --- a million tokens


def long_stream(
    model: Any,
    passage: np.ndarray,
    passes: int,
    description: SinkWindow,
    lead: Sequence[int],
    chunk_size: int,
    tell: Callable[[int, float], None] = lambda number, perplexity: None,
) -> dict[str, Any]:
    """Feed a passage again and again to one stream.

    Returns:
      `perplexities` of the passes; `drift`, last over second, less one; `tokens`; bytes of the cache
      at the start and the end; how much the peak memory of the process grew from the second pass to
      the last; `seconds` of the passes.
    """
    session = Session.start(model, description)
    at_start = session.cache.nbytes
    perplexities, seconds, peak = [], [], 0
    for number in range(passes):
        since = time.perf_counter()
        parts = list(score(model, [passage], cache=session, lead=lead, chunk_size=chunk_size))
        # The first token of a later pass is predicted from the end of the one before.
        perplexities.append(perplexity(np.concatenate([part.nll for part in parts])))
        seconds.append(time.perf_counter() - since)
        if number == min(1, passes - 1):
            peak = peak_memory_bytes()
        tell(number, perplexities[-1])
    return {
        "tokens": session.position + (session.pending is not None),
        "evicted": max(session.position - session.cache.capacity, 0),
        "perplexities": perplexities,
        "drift": perplexities[-1] / perplexities[min(1, passes - 1)] - 1,
        "cache_bytes": [at_start, session.cache.nbytes],
        "memory_growth_bytes": peak_memory_bytes() - peak,
        "seconds": seconds,
    }


def perplexity(nll: np.ndarray) -> float:
    """e to the mean of these nats."""
    return float(np.exp(np.mean(nll, dtype=np.float64)))


def beyond(
    model: Any,
    text: np.ndarray,
    cache: Description | Session,
    lead: Sequence[int],
    skip: int,
    chunk_size: int = 128,
) -> float:
    """Perplexity of the tokens of a text from number `skip` on, where the cache has begun to evict."""
    parts = list(score(model, [text], cache=cache, lead=lead, chunk_size=chunk_size))
    return perplexity(np.concatenate([part.nll for part in parts])[skip:])


# --- sinks


def without_sinks(model: Any, text: np.ndarray, lead: Sequence[int], slots: int) -> dict[str, Any]:
    """Perplexity of a stream past its cache with 0, 1, 2 and 4 sink tokens, and with those detected.

    The number of slots is the same for all. Detection reads one context of the stream.

    Returns:
      `perplexity` by number of sinks and `detected`; `positions` that were detected.
    """
    found: dict[str, float] = {}
    for count in SINKS:
        found[str(count)] = beyond(model, text, SinkWindow(count, slots - count), lead, slots)
    context = model.config.context_length
    start = np.concatenate([np.asarray(lead, np.int32), text])[None, :context]
    most = 4
    sinks = detect_sinks(model, start, max_sink_tokens=most)[0]
    positions = sinks[sinks >= 0].tolist()
    session = Session.start(model, SinkWindow("auto", slots - most, max_sink_tokens=most))
    session.cache = pinned(model, session.cache, start)
    found["detected"] = beyond(model, text, session, lead, slots)
    return {"perplexity": found, "positions": positions}


def late_lead(lead: Sequence[int], before: int, seed: int) -> list[int]:
    """The lead behind some symbols of the toy task, so that its sink is not the first token."""
    symbols = np.random.default_rng(seed).integers(3, NUM_SYMBOLS, before)
    return [*symbols.tolist(), *lead]


# --- few bits


def in_few_bits(
    model: Any,
    text: np.ndarray,
    lead: Sequence[int],
    slots: int,
    sinks: int,
    group_size: int,
    residual: int,
) -> dict[str, dict[str, float]]:
    """Perplexity and bytes of a cache in full precision, and of 4 and 2 bits with the sinks in full
    precision and without."""
    inner = SinkWindow(sinks, slots - sinks)
    rows: dict[str, Description] = {"full precision": inner}
    for bits in (4, 2):
        options: dict[str, Any] = {"bits": bits, "group_size": group_size, "residual": residual}
        rows[f"{bits} bits, sinks protected"] = Quantised(inner, **options)
        rows[f"{bits} bits, nothing protected"] = Quantised(
            inner, **options, first_full_precision=0
        )
    return {
        name: {
            "perplexity": beyond(model, text, description, lead, slots),
            "bytes": model.init_cache(description, 1).nbytes,
        }
        for name, description in rows.items()
    }


TOY_LEAD = (BOS_ID,)
TEXT_LEAD = (BOS,)
