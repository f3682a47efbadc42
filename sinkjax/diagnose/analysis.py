"""`analyze`: from a model and some tokens to a report of its sinks."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from sinkjax.diagnose.capture import capturable
from sinkjax.diagnose.metrics import ENTRIES, METRICS, Observation, Settings
from sinkjax.diagnose.report import Report
from sinkjax.models import Decoder
from sinkjax.typing import TextEncoder


def analyze(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"] | Sequence[str],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: TextEncoder | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    max_rows: int = 32,
) -> Report:
    """Measure the sinks of a model on some tokens.

    All metrics are reduced inside one jitted function: only per-layer and per-head numbers leave
    it. Metrics marked dense in `METRICS` form attention-sized arrays in there; leave them out for
    long texts.

    Args:
        model: the decoder, scanned or not.
        tokens: [B, T] ids, each row led by BOS if the model was trained so; or texts, which are
            cut into rows of `context_length` tokens, each led by BOS.
        metrics: names in `METRICS`; None measures all of them.
        tokenizer: needed for texts.
        settings: threshold, length and position that define the sink.
        max_rows: most rows that texts are cut into.
    Returns:
        `Report`.
    Raises:
        ValueError: unknown metric (lists the choices), empty or too short tokens, ids outside the
            vocabulary, texts without a tokenizer, a position outside the tokens.
    """
    names = tuple(METRICS) if metrics is None else tuple(dict.fromkeys(metrics))
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"metrics: expected some of {', '.join(METRICS)}; got {list(names)}")
    config = model.config
    if not isinstance(tokens, jax.Array | np.ndarray):
        if tokenizer is None:
            raise ValueError("tokenizer: expected one, since tokens are texts; got None")
        tokens = rows_of_texts(tokens, tokenizer, config.context_length, max_rows)
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"tokens: expected [B, T] with B >= 1 and T >= 2, got shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"tokens: expected ids in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}"
        )
    measured = min(ids.shape[1], settings.sink_tokens)
    if settings.position >= measured:
        raise ValueError(f"position: expected below {measured} tokens, got {settings.position}")
    if any(METRICS[name].dense for name in names):
        model = capturable(model)
    graphdef, state = nnx.split(model)
    entries = jax.device_get(_measure(graphdef, names, settings, state, jnp.asarray(ids)))
    # A jitted function returns its dict sorted; the table wants the order of the definitions.
    found = {name: entries[name] for name in ENTRIES if name in entries}
    return Report(
        scalars={name: float(value) for name, value in found.items() if value.ndim == 0},
        arrays={name: np.asarray(value) for name, value in found.items() if value.ndim},
        metadata={
            "metrics": list(names),
            "sequences": ids.shape[0],
            "tokens_per_sequence": ids.shape[1],
            "settings": dataclasses.asdict(settings) | {"sink_tokens": measured},
            "model": dataclasses.asdict(config),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(graphdef, names, settings, state, tokens) -> dict[str, Array]:
    seen = Observation(nnx.merge(graphdef, state), tokens, settings)
    found: dict[str, Array] = {}
    for name in names:
        found |= METRICS[name].measure(seen)
    return found


def rows_of_texts(
    texts: Sequence[str], tokenizer: TextEncoder, length: int, max_rows: int
) -> Int[np.ndarray, "B T"]:
    """Texts as rows of equal length, each led by BOS; remainders that fill no row are dropped.

    Args:
        texts: at least one. tokenizer: its `encode` gives ids without BOS.
        length: T, tokens per row with BOS; shortened to the longest text if that is shorter.
        max_rows: stop after so many rows.
    Returns:
        [B, T] ids.
    Raises:
        ValueError: a string instead of a sequence of texts, or nothing to encode.
    """
    if isinstance(texts, str):
        raise ValueError("tokens: expected [B, T] ids or a list of texts, got one string")
    encoded = [np.asarray(tokenizer.encode(text), np.int32) for text in texts]
    longest = max((len(ids) for ids in encoded), default=0)
    if longest < 1:
        raise ValueError(
            f"tokens: expected texts with at least one token, got {len(encoded)} empty"
        )
    body = min(length - 1, longest)
    rows = [
        np.concatenate([[tokenizer.bos_id], ids[start : start + body]])
        for ids in encoded
        for start in range(0, len(ids) - body + 1, body)
    ]
    return np.stack(rows[:max_rows]).astype(np.int32)
