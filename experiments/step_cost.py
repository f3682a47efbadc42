"""What a variant costs: one training step beside plain softmax's, in interleaved pairs.

The part of `variants.py` behind `--cost`; it has no command of its own.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np
from several_seeds import TOLD

from sinkjax.models import DecoderConfig
from sinkjax.models.variants import variants
from sinkjax.sharding import make_mesh
from sinkjax.train import DataConfig, RunConfig, init_state, make_train_step

VARIANTS = (
    "softmax1",
    "softmax_n, n = 4",
    "sink logit",
    "4 sink logits",
    "sink logit per token",
    "key bias",
    "key and value bias",
    "gate, head-wise",
)
LIMIT = 1.05


def model(fields: dict[str, Any]) -> DecoderConfig:
    """D = 256, T = 256: large enough that attention is not all overhead, small enough to repeat."""
    return DecoderConfig(
        vocab_size=257,
        model_dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=688,
        context_length=256,
        **fields,
    )


class Step:
    """One training step of a model, again and again on the same rows."""

    def __init__(self, config: DecoderConfig, batch_size: int = 4):
        run = RunConfig(model=config, data=DataConfig(batch_size=batch_size), path="unused")
        mesh = make_mesh(1, 1)
        self._state, self._step = init_state(run, mesh), make_train_step(run, mesh)
        T = config.context_length
        ids = np.random.default_rng(0).integers(0, 256, (batch_size, T + 1)).astype(np.int32)
        ones = np.ones((batch_size, T), np.int32)
        positions = ones * np.arange(T, dtype=np.int32)
        self._batch = jax.device_put(
            dict(zip(TOLD, (ids[:, :-1], ids[:, 1:], positions, ones, ones), strict=True))
        )
        self.seconds()  # compiles
        self.seconds()

    def seconds(self) -> float:
        """Forward, backward and update, once."""
        since = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - since


def measure(name: str, pairs: int, softmax: Step) -> dict[str, Any]:
    """A variant's step over softmax's, in pairs: ABBAABBA...

    Returns:
      `ratio`, the median; `low` and `high`, its 95 % interval by order statistics; `quartiles` of
      the pairs; `milliseconds` of softmax, the median.
    """
    step = Step(model(variants(256)[name].fields))
    ratios, base = [], []
    for pair in range(pairs):
        if pair % 2:
            b, a = step.seconds(), softmax.seconds()
        else:
            a, b = softmax.seconds(), step.seconds()
        ratios.append(b / a)
        base.append(a)
    ratios.sort()
    reach = 0.98 * pairs**0.5  # normal approximation of the sign test
    low, high = max(int(pairs / 2 - reach), 0), min(int(pairs / 2 + reach), pairs - 1)
    return {
        "variant": name,
        "ratio": statistics.median(ratios),
        "low": ratios[low],
        "high": ratios[high],
        "quartiles": np.percentile(ratios, (25, 75)),
        "milliseconds": 1e3 * statistics.median(base),
    }
