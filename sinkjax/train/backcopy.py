"""The Bigram-Backcopy comparison: the same one-layer model under each attention variant."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sinkjax.models.config import DecoderConfig
from sinkjax.models.variants import variants
from sinkjax.train.config import DataConfig, OptimizerConfig, RunConfig
from sinkjax.train.tasks import VOCAB_SIZE, Backcopy

LENGTH, BATCH_SIZE, STEPS = 32, 64, 400
"""T, rows per step and steps of the comparison (training notes of Guo et al.'s task at toy size)."""

VARIANTS: dict[str, dict[str, Any]] = {
    name: variants(LENGTH)[name].fields
    for name in (
        "softmax",
        "softmax1",
        "sink logit",
        "sigmoid, bias -ln T",
        "gate, element-wise",
        "gate, head-wise",
        "sigmoid, no bias",
        "softpick",
    )
}
"""Variant -> fields of `DecoderConfig` in which it differs from plain softmax attention."""

HELD_OUT_SEED = 2**40
"""Rows that measure a trained model; no run's seed reaches it."""


def backcopy_run(variant: str, path: str | Path, *, seed: int = 0, steps: int = STEPS) -> RunConfig:
    """The run that trains one variant: one layer, one head, d = 64, AdamW at 1e-2, no decay.

    The rate is constant after a warm-up of 100 steps. With a shorter warm-up some seeds leave
    softmax1 with a small constant weight on BOS: no sink that idle heads rest on, but a
    bias that the first large steps have put there and that nothing removes.

    Args:
      variant: a name in `VARIANTS`.
      path: run folder.
      seed: of the parameters and of the rows.
      steps: optimiser steps; fewer than 400 shorten the warm-up with them.

    Raises:
      ValueError: unknown variant; lists the choices.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    model = DecoderConfig(
        vocab_size=VOCAB_SIZE,
        model_dim=64,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=176,  # 8/3 of the width, up to a multiple of 16
        context_length=LENGTH,
        **VARIANTS[variant],
    )
    return RunConfig(
        model=model,
        data=DataConfig(source="backcopy", batch_size=BATCH_SIZE, seed=seed),
        optimizer=OptimizerConfig(
            learning_rate=1e-2,
            schedule="constant",
            warmup_steps=min(100, steps // 4),
            weight_decay=0.0,
        ),
        path=str(path),
        steps=steps,
        seed=seed,
        eval_every=steps,
        eval_batches=4,
        checkpoint_every=steps,
    )


def held_out_rows(count: int = 256, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Rows that no run is trained on, the same for every variant."""
    return Backcopy(length, HELD_OUT_SEED).rows(np.arange(count))


def attention_to_bos(
    weights: Float[np.ndarray, "B N T T"], is_trigger: Bool[np.ndarray, "B T"]
) -> float:
    """Mean weight on BOS from queries that have nothing to copy.

    The sink of this task: the mean of w[t, 0] over the queries t ≥ 1 whose token is no trigger, and
    over rows and heads. BOS itself, which sees nothing else, is left out.

    Args:
      weights: attention weights of one layer.
      is_trigger: True where the query's token is a trigger.

    Returns:
      A share: about 0.1 at the start of training, near 1 for a head that rests on BOS.

    Source: Guo et al. 2024, arXiv 2410.13835, section 2.
    """
    idle = ~np.asarray(is_trigger, bool)
    idle[:, 0] = False
    return float(np.asarray(weights)[..., 0].mean(axis=1)[idle].mean())
