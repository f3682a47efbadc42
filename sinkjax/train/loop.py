"""The training run, top to bottom."""

import dataclasses
import errno
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sinkjax.files import write_whole
from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import from_parameters
from sinkjax.sharding import batch_sharding, make_mesh
from sinkjax.strict_json import from_json, to_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import RunConfig, differences
from sinkjax.train.data import Batch, iterate, load_data
from sinkjax.train.log import MetricsLog, Progress, read_metrics
from sinkjax.train.step import abstract_state, init_state, make_eval_step, make_train_step

logger = logging.getLogger("sinkjax.train")

# Fields in which a run may differ from the one it continues: they do not enter its numbers.
CHANGEABLE = ("path", "mesh.", "checkpoint_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` gives back.

    Args:
      model: with the parameters of the last step.
      config: the run's.
      metrics: the records of `metrics.jsonl`, from the first step on.
      path: the run folder.
      step: steps done.
      interrupted: Ctrl-C ended the run early; it is saved, and the same call goes on.
    """

    model: Decoder
    config: RunConfig
    metrics: list[dict[str, Any]]
    path: Path
    step: int
    interrupted: bool


def fit(
    config: RunConfig, *, progress: bool | None = None, stop: threading.Event | None = None
) -> Run:
    """Train a model, or go on with a run that was interrupted, killed or finished.

    The run folder gets `config.json`, `metrics.jsonl` (records of two kinds: `split` "train" with
    loss, and "validation" with loss and sink statistics, see `make_eval_step`) and
    `checkpoints/<step>`. If it holds a run of the same config, that run goes on from its newest
    checkpoint and gives, on the same kind of device, bit for bit what it would have given unbroken.

    The first Ctrl-C saves and returns a `Run` whose `interrupted` is True; a second one raises
    `KeyboardInterrupt` at once.

    Args:
      config: everything that decides the result.
      progress: show a live line; None shows it on a terminal.
      stop: ends the run early when it is set, as Ctrl-C does; for runs in a thread, where signals do
        not arrive.

    Returns:
      The trained model and what was measured.

    Raises:
      ValueError: bad data, a batch that does not divide over the mesh, or a folder that holds
        a run of another config; names the field.
      FloatingPointError: the loss stopped being a number.
      OSError: the folder cannot be written; names the path.
    """
    # --- Devices and data, before anything is written ---------------------------------------
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    _check_batch(config, mesh)
    shape = config.model
    data, validation = load_data(
        config.data, shape.context_length, shape.vocab_size, shape.num_learned_sink_tokens
    )
    held_out = [validation[i] for i in range(config.eval_batches)]
    batches = iterate(data)

    # --- Run folder --------------------------------------------------------------------------
    folder = Path(config.path)
    _open_folder(folder, config)

    with (
        Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints,
        jax.set_mesh(mesh),
    ):
        # --- State, new or restored ----------------------------------------------------------
        newest = checkpoints.latest
        if newest is None:
            state = init_state(config, mesh)
        else:
            state = checkpoints.restore(newest, abstract_state(config, mesh), batches, shape)
        start = step = newest or 0
        log = MetricsLog(folder / "metrics.jsonl", -1 if newest is None else start)
        train_step, eval_step = make_train_step(config, mesh), make_eval_step(config, mesh)

        def evaluate(step: int, params: Any) -> None:
            found = [eval_step(params, _place(batch, mesh)) for batch in held_out]
            mean = jax.tree.map(lambda *values: np.mean(jax.device_get(values), axis=0), *found)
            log.write({"step": step, "split": "validation"} | mean)

        # --- Loop ----------------------------------------------------------------------------
        if newest is None:
            evaluate(0, state.params)
        with (
            Progress(config.steps, start, progress) as bar,
            _interrupts(stop or threading.Event()) as interrupted,
        ):
            since, last = time.perf_counter(), start
            while step < config.steps and not interrupted.is_set():
                state, metrics = train_step(state, _place(next(batches), mesh))
                step += 1
                if step % config.log_every == 0 or step == config.steps:
                    metrics = {name: float(value) for name, value in metrics.items()}
                    now = time.perf_counter()
                    tokens = (step - last) * config.data.batch_size * shape.context_length
                    speed = tokens / (now - since)
                    since, last = now, step
                    record = {"step": step, "split": "train", **metrics}
                    log.write(record | {"tokens_per_second": speed})
                    bar.update(step, metrics["loss"], speed)
                    if not math.isfinite(metrics["loss"]):
                        raise FloatingPointError(
                            f"step {step}: loss is {metrics['loss']}; "
                            "a lower learning rate or a longer warm-up may help"
                        )
                evaluating = step % config.eval_every == 0 or step == config.steps
                saving = step % config.checkpoint_every == 0 or step == config.steps
                if evaluating or saving:
                    jax.block_until_ready(state.params)
                    pause = time.perf_counter()
                    if evaluating:
                        evaluate(step, state.params)
                    if saving:
                        checkpoints.save(state, batches)
                    since += time.perf_counter() - pause  # the speed is that of training alone
            early = interrupted.is_set() and step < config.steps

        # --- End -----------------------------------------------------------------------------
        checkpoints.wait()
        if early and checkpoints.latest != step:
            checkpoints.save(state, batches)
            checkpoints.wait()
        if early:
            logger.warning(
                "interrupted at step %d of %d and saved in %s; the same call or command goes on",
                step,
                config.steps,
                folder,
            )
        model = from_parameters(shape, state.params)
    return Run(model, config, log.records, folder, step, early)


def _check_batch(config: RunConfig, mesh: Mesh) -> None:
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    if rows % mesh.shape["data"]:
        raise ValueError(
            f"data.batch_size: expected microbatches of a multiple of {mesh.shape['data']} rows, "
            f"one part per device along mesh.data, got {rows}"
        )


def _open_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder, or refuse one that holds a run of another config."""
    file = folder / "config.json"
    if file.exists():
        checkpoints = folder / "checkpoints"
        used = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
        if used or read_metrics(folder / "metrics.jsonl"):
            old = from_json(RunConfig, file.read_text(encoding="utf-8"), name=str(file))
            for name, there, here in differences(old, config):
                if not name.startswith(CHANGEABLE):
                    raise ValueError(
                        f"{name}: {folder} holds a run with {there!r}, got {here!r}; "
                        "give another path to start another run"
                    )
    if jax.process_index() == 0:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "path: expected a folder", str(folder))
        write_whole(file, to_json(config))


def _place(batch: Batch, mesh: Mesh) -> Any:
    """The global batch on the devices; every process brings its own rows."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


@contextmanager
def _interrupts(event: threading.Event) -> Iterator[threading.Event]:
    """Let Ctrl-C set the event; a second Ctrl-C raises as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield event  # signal handlers can be set in the main thread only
        return

    def handle(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
