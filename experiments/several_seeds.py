"""One run with several seeds in one compiled program, and what the trained models show.

The part of `variants.py` that trains and measures; it has no command of its own.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.diagnose.capture import run as run_captured
from sinkjax.models import Decoder, DecoderConfig
from sinkjax.models.parameters import from_parameters, parameters
from sinkjax.ops import statistics as formulas
from sinkjax.ops.losses import cross_entropy
from sinkjax.sharding import make_mesh
from sinkjax.train import (
    RunConfig,
    TrainState,
    attention_to_bos,
    held_out_rows,
    load_data,
    make_optimizer,
    make_train_step,
)

TOLD = ("tokens", "targets", "positions", "segment_ids", "loss_mask")  # entries a step reads
BLOCK = 10  # steps of one compiled call, at most
PAIRS = 5  # of blocks, another run's beside this one's, that give the relative speed
HELD_OUT = {"backcopy": 256, "text": 128}  # rows

# --- rows


def seeded(run: RunConfig, seed: int) -> RunConfig:
    """The run with another seed, of parameters and of rows."""
    return dataclasses.replace(run, seed=seed, data=dataclasses.replace(run.data, seed=seed))


def training_rows(run: RunConfig) -> dict[str, np.ndarray]:
    """All batches of a run [steps, B, T], those that `fit` reads."""
    model = run.model
    learned = model.num_learned_sink_tokens
    is_text = run.data.source == "text"
    length = model.context_length if is_text else model.context_length - learned
    data, _ = _load(run.data, length, model.vocab_size, learned if is_text else 0)
    batches = [data[index] for index in range(run.steps)]
    if not is_text:
        batches = [led(batch, model.learned_sink_ids) for batch in batches]
    return {name: np.stack([batch[name] for batch in batches]) for name in TOLD}


def measured_rows(run: RunConfig) -> dict[str, np.ndarray]:
    """Rows that no seed is trained on, one segment each, the same for every seed."""
    model, count = run.model, HELD_OUT[run.data.source]
    if run.data.source == "backcopy":
        return led(held_out_rows(count), model.learned_sink_ids)
    learned = model.num_learned_sink_tokens
    data = dataclasses.replace(run.data, seed=0)
    _, batches = _load(data, model.context_length, model.vocab_size, learned)
    found: list[dict[str, np.ndarray]] = []
    for index in range(count):
        batch = batches[index]
        whole = (batch["segment_ids"] == 1).all(axis=1)
        found.append({name: batch[name][whole] for name in TOLD})
        if sum(len(part["tokens"]) for part in found) >= count:
            break
    return {name: np.concatenate([part[name] for part in found])[:count] for name in TOLD}


# Reading and packing the text takes longer than a hundred steps; rows are never changed.
_load = functools.lru_cache(maxsize=8)(load_data)


def led(batch: dict[str, np.ndarray], ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Backcopy rows behind learned sink tokens, which are no targets; `is_trigger` stays as it is."""
    B, P = len(batch["tokens"]), len(ids)
    if P == 0:
        return batch
    lead = np.tile(np.asarray(ids, np.int32), (B, 1))
    zeros, ones = np.zeros_like(lead), np.ones_like(lead)
    begin = {
        "tokens": lead,
        "targets": zeros,
        "positions": ones * np.arange(P, dtype=np.int32),
        "segment_ids": ones,
        "loss_mask": zeros,
    }
    later = dict(batch, positions=batch["positions"] + P)
    return batch | {name: np.concatenate([begin[name], later[name]], axis=1) for name in begin}


# --- training, all seeds in one program


class Together:
    """A run with several seeds: their training steps are one compiled program.

    Seed after seed inside the program, not side by side: on one core of a CPU that is 10 to 30 % faster
    than `vmap`, whose batched products of small matrices fit no cache. The step is the one that `fit`
    takes, so a seed's numbers are those of `fit`.

    Args:
      run: the run, whose seed is not used.
      seeds: of parameters and rows.
    """

    def __init__(self, run: RunConfig, seeds: Sequence[int]):
        runs = [seeded(run, seed) for seed in seeds]
        self.states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(_initial, runs))
        rows = [training_rows(one) for one in runs]
        size = max(size for size in range(1, BLOCK + 1) if run.steps % size == 0)
        # [blocks, seeds, steps of a block, B, T]
        shape = (len(seeds), run.steps // size, size)
        self.batches = {
            name: np.stack([one[name] for one in rows])
            .reshape(*shape, *rows[0][name].shape[1:])
            .swapaxes(0, 1)
            for name in TOLD
        }
        step = make_train_step(run, make_mesh(1, 1))

        def block(states: TrainState, batches: Any) -> Any:
            return jax.lax.map(lambda one: jax.lax.scan(step, *one), (states, batches))

        self._block = jax.jit(block).lower(self.states, self._batch(0)).compile()

    def __len__(self) -> int:
        return len(self.batches["tokens"])

    def block(self, index: int) -> tuple[np.ndarray, float]:
        """Steps of one block; their losses [seeds, steps] in nats per token, and the seconds."""
        batch = jax.block_until_ready(self._batch(index % len(self)))
        since = time.perf_counter()
        self.states, metrics = jax.block_until_ready(self._block(self.states, batch))
        return np.asarray(metrics["nll"]), time.perf_counter() - since

    def _batch(self, index: int) -> Any:
        return {name: jnp.asarray(rows[index]) for name, rows in self.batches.items()}


def _initial(run: RunConfig) -> TrainState:
    """What `init_state` makes, operation by operation: nothing to compile for each seed."""
    params = parameters(Decoder(run.model, rngs=nnx.Rngs(run.seed)))
    opt_state = make_optimizer(run.optimizer, run.steps).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jax.random.key(run.seed))


def train(run: RunConfig, seeds: Sequence[int], beside: Together) -> tuple[Any, Any, float]:
    """Train all seeds, with blocks of another run in between for comparison.

    Returns:
      Parameters with a leading seed axis; training losses [seeds, steps]; speed over that of
      `beside`, the median over pairs of blocks that ran one after the other.
    """
    together = Together(run, seeds)
    paired = {int(place) for place in np.linspace(0, len(together) - 1, PAIRS + 1)[1:]}
    losses, ratios = [], []
    for index in range(len(together)):
        other = None
        if index in paired and len(ratios) % 2 == 0:
            other = beside.block(index)[1]
        found, seconds = together.block(index)
        if index in paired and other is None:
            other = beside.block(index)[1]
        if other is not None:
            ratios.append(other / seconds)
        losses.append(found)
    return together.states.params, np.concatenate(losses, axis=1), statistics.median(ratios)


# --- measuring


def measure(run: RunConfig, params: Any) -> list[dict[str, Any]]:
    """Each seed's model on the held-out rows.

    Args:
      run: of the models.
      params: with a leading seed axis.

    Returns:
      A dictionary per seed. `loss` in nats per token; for BOS, over layers, heads and rows: `to_bos`
      (backcopy), mean weight from idle queries; `sink_rate_0.2`, `sink_rate_0.3` and the same
      `_normalized`, per sample in the order of Gu et al., from raw and row-normalised weights;
      `importance`, mean weight from all queries, and `importance_by_layer`; `value_drain`, norm of
      its value over the mean norm of the others, in the layer of the largest importance.
      `row_mass`, mean sum of a row's weights; `sink_mass`, mean weight on sink logits, learned keys
      and learned sink tokens; `zeros`, share of the visible weights that are exactly 0; `kurtosis`
      and `kurtosis_max`, Bondarenko's, mean and maximum over the residual stream after each half of
      each block; `max_activation`, largest magnitude in those.
    """
    model, rows = run.model, measured_rows(run)
    batch = {name: jnp.asarray(rows[name]) for name in TOLD}
    found = jax.device_get(_all_numbers(model, jax.device_get(params), batch))
    first = found.pop("first_layer")  # [seeds, B, N, T, T]
    results = []
    for seed in range(len(first)):
        result = {name: np.asarray(values[seed]).tolist() for name, values in found.items()}
        if "is_trigger" in rows:
            idle = rows["is_trigger"] == 1
            result["to_bos"] = attention_to_bos(first[seed], idle)
        results.append(result)
    return results


@functools.partial(jax.jit, static_argnums=0)
def _all_numbers(config: DecoderConfig, params: Any, batch: Any) -> dict[str, Any]:
    return jax.lax.map(lambda one: _numbers(config, one, batch), params)


def _numbers(config: DecoderConfig, params: Any, batch: Any) -> dict[str, Any]:
    found = run_captured(
        from_parameters(config, params),
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    )
    bos = config.num_learned_sink_tokens
    sinks, weights, residual = found.statistics, found.weights, found.residual
    mass, normalized, count = (
        sinks[name] for name in ("key_mass", "key_mass_normalized", "key_count")
    )
    importance = formulas.importance(mass, count)[..., bos].mean(axis=(1, 2))
    drain = formulas.value_norm_drain(sinks["value_norm"], position=bos)
    kurtosis = formulas.kurtosis_bondarenko(residual).mean(axis=-1)
    _, loss = cross_entropy(found.logits, batch["targets"], batch["loss_mask"])
    own = weights[..., bos:, :bos].sum(axis=-1).mean() + sinks["sink_mass"][..., bos:].mean()
    rates = {
        f"sink_rate_{epsilon}{suffix}": formulas.sink_rate(kind, count, epsilon, bos)
        for epsilon in (0.2, 0.3)
        for suffix, kind in (("", mass), ("_normalized", normalized))
    }
    return rates | {
        "loss": loss["nll"],
        "first_layer": weights[0, ..., bos:, bos:],
        "importance": importance.mean(),
        "importance_by_layer": importance,
        "value_drain": drain[jnp.argmax(importance)],
        "row_mass": weights[..., bos:, :].sum(axis=-1).mean(),
        "sink_mass": own,
        "zeros": 1 - jnp.count_nonzero(weights) / count.sum(),
        "kurtosis": kurtosis.mean(),
        "kurtosis_max": kurtosis.max(),
        "max_activation": jnp.abs(residual).max(),
    }
