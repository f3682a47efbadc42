"""The training run, top to bottom."""

import dataclasses
import errno
import logging
import math
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sinkjax.files import write_whole
from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import from_parameters
from sinkjax.sharding import ROWS, make_mesh
from sinkjax.strict_json import from_json, to_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import RunConfig, differences
from sinkjax.train.data import iterate, load_data, local_rows, place
from sinkjax.train.log import MetricsLog, Progress, read_metrics, speed
from sinkjax.train.step import abstract_state, init_state, make_eval_step, make_train_step
from sinkjax.train.stopping import Stopping

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
      interrupted: Ctrl-C or SIGTERM ended the run early; it is saved, and the same call goes on.
      preempted: it was SIGTERM, or came from another process.
    """

    model: Decoder
    config: RunConfig
    metrics: list[dict[str, Any]]
    path: Path
    step: int
    interrupted: bool
    preempted: bool = False


def fit(
    config: RunConfig, *, progress: bool | None = None, stop: threading.Event | None = None
) -> Run:
    """Train a model, or go on with a run that was interrupted, killed or finished.

    The run folder gets `config.json`, `metrics.jsonl` (records of two kinds: `split` "train" with
    loss and speed, see `speed`, and "validation" with loss and sink statistics, see
    `make_eval_step`) and `checkpoints/<step>`. If it holds a run of the same config, that run goes
    on from its newest checkpoint that is whole and gives, on the same devices, bit for bit what it
    would have given unbroken.

    The first Ctrl-C saves and returns a `Run` whose `interrupted` is True; a second one raises
    `KeyboardInterrupt` at once. SIGTERM, by which clusters announce that they take a machine away,
    does the same, and sets `preempted` too.

    Several processes (`sinkjax.train.joined`, or `jax.distributed.initialize`) call it alike, with
    a folder that all of them see. Each builds the rows that its devices hold and writes its part of
    a checkpoint; process 0 writes the rest. A signal to one of them stops all after the same step.

    Args:
      config: everything that decides the result.
      progress: show a live line; None shows it on a terminal.
      stop: ends the run early when it is set, as Ctrl-C does; for runs in a thread, where signals do
        not arrive.

    Returns:
      The trained model and what was measured.

    Raises:
      ValueError: bad data, a batch that does not divide over the mesh, a mesh without devices of
        this process, or a folder that holds a run of another config; names the field.
      FloatingPointError: the loss stopped being a number.
      OSError: the folder cannot be written; names the path.
    """
    # --- Devices and data, before anything is written ---------------------------------------
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    _check_batch(config, mesh)
    shape, B = config.model, config.data.batch_size
    rows = local_rows(mesh, B)
    data, validation = load_data(
        config.data, shape.context_length, shape.vocab_size, shape.num_learned_sink_tokens, rows
    )
    held_out = [validation[i] for i in range(config.eval_batches)]
    batches = iterate(data)

    # --- Run folder --------------------------------------------------------------------------
    folder = Path(config.path)
    _open_folder(folder, config)
    _check_shared(folder, config)

    stopping = Stopping(stop)
    with (
        Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints,
        jax.set_mesh(mesh),
        stopping.on_sigterm(),
    ):
        # --- State, new or restored ----------------------------------------------------------
        found = checkpoints.restore_newest(abstract_state(config, mesh), batches, shape)
        state, start = (init_state(config, mesh), 0) if found is None else found
        step, saved = start, None if found is None else start
        log = MetricsLog(folder / "metrics.jsonl", -1 if found is None else start)
        train_step, eval_step = make_train_step(config, mesh), make_eval_step(config, mesh)

        def evaluate(step: int, params: Any) -> None:
            found = [eval_step(params, place(batch, rows, B, mesh)) for batch in held_out]
            mean = jax.tree.map(lambda *values: np.mean(jax.device_get(values), axis=0), *found)
            log.write({"step": step, "split": "validation"} | mean)

        # --- Loop ----------------------------------------------------------------------------
        if found is None:
            evaluate(0, state.params)
        with Progress(config.steps, start, progress) as bar, stopping.on_interrupt():
            since, last = time.perf_counter(), start
            while step < config.steps and not stopping.after(step):
                state, metrics = train_step(state, place(next(batches), rows, B, mesh))
                step += 1
                if step % config.log_every == 0 or step == config.steps:
                    metrics = {name: float(value) for name, value in metrics.items()}
                    now = time.perf_counter()
                    tokens = (step - last) * B * shape.context_length
                    fast = speed(shape, mesh, tokens / (now - since))
                    since, last = now, step
                    log.write({"step": step, "split": "train", **metrics, **fast})
                    bar.update(step, metrics["loss"], fast["tokens_per_second"])
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
                        saved = step
                    since += time.perf_counter() - pause  # the speed is that of training alone

        # --- End -----------------------------------------------------------------------------
        checkpoints.wait()
        early = step < config.steps
        if early and saved != step:
            checkpoints.save(state, batches)
            checkpoints.wait()
        if early and jax.process_index() == 0:
            logger.warning(
                "%s at step %d of %d and saved in %s; the same call or command goes on",
                "interrupted" if stopping.interrupted else "stopped by SIGTERM",
                step,
                config.steps,
                folder,
            )
        model = from_parameters(shape, state.params)
    preempted = early and not stopping.interrupted
    return Run(model, config, log.records, folder, step, early, preempted)


def _check_batch(config: RunConfig, mesh: Mesh) -> None:
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    parts = math.prod(mesh.shape.get(name, 1) for name in ROWS)
    if rows % parts:
        raise ValueError(
            f"data.batch_size: expected microbatches of a multiple of {parts} rows, "
            f"one part per device along mesh.data and mesh.expert, got {rows}"
        )
    length, parts = config.model.context_length, mesh.shape.get("sequence", 1)
    if length % parts:
        raise ValueError(
            f"model.context_length: expected a multiple of {parts} tokens, one part per device "
            f"along mesh.sequence, got {length}"
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


def _check_shared(folder: Path, config: RunConfig) -> None:
    """Refuse a folder of which every process has its own, and processes that want different runs.

    Checkpoints would lie about in parts, and losses would be a mixture, without a word.
    """
    if jax.process_count() == 1:
        return
    mark, file = np.zeros((), np.uint32), folder / ".shared"
    if jax.process_index() == 0:
        mark = np.uint32(secrets.randbits(32))  # a copy of an older run has another
        write_whole(file, f"{mark}\n")
    wanted = f"{int(multihost_utils.broadcast_one_to_all(mark))}\n"
    end = time.monotonic() + _SEEN_WITHIN
    while not (file.exists() and file.read_text(encoding="utf-8") == wanted):
        if time.monotonic() > end:
            raise ValueError(
                f"path: expected a folder that all processes share, got {folder}, in which process "
                f"{jax.process_index()} does not see what process 0 wrote"
            )
        time.sleep(0.5)
    written = folder / "config.json"
    there = from_json(RunConfig, written.read_text(encoding="utf-8"), name=str(written))
    for name, first, here in differences(there, config):
        if name != "path":
            raise ValueError(
                f"{name}: expected what process 0 has, {first!r}, got {here!r} in process "
                f"{jax.process_index()}"
            )


# Seconds; network file systems remember for some time that a file was not there.
_SEEN_WITHIN = 60
