"""Checkpoints of a run, on Orbax v1: the one file to change when its API becomes final.

`checkpoints/<step>/params` holds the nested dictionary of parameters and nothing else, so that a
model can be read without knowing its optimiser; `checkpoints/<step>/train` the rest of the state;
`checkpoints/<step>/checksums.json` what both must look like (`sinkjax.checksums`).
"""

import itertools
import logging
import re
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sinkjax.checksums import damage, write_checksums
from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import check_shapes
from sinkjax.train.step import TrainState

logger = logging.getLogger("sinkjax.train")

_UNFINISHED = ".orbax-checkpoint-tmp"
_LATE_WRITES = 2.0  # seconds
_PARTS = ("params", "train")


class Checkpoints:
    """The checkpoints of one run folder: atomic, written in the background, the newest N kept.

    A checkpoint is parameters, optimiser, step, random key and the number of the next batch in one
    unit that exists whole or not at all. What a killed process left half-written is removed when
    the folder is opened. On many hosts every process calls every method, and all see one folder.

    Args:
      folder: made if it is not there.
      keep: how many stay.

    Raises:
      OSError: the folder cannot be made or written; names the path.
    """

    # Orbax tells its threads apart by a counter of the whole process: two saves at once wait for
    # each other's folders (seen with 0.12.8). Runs in several threads take turns.
    _turn = threading.Lock()
    _writer: "Checkpoints | None" = None

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._failed = False
        self._error: Exception | None = None
        self._quiet = _Quiet()
        logging.getLogger("absl").addFilter(self._quiet)
        self._saving = 0
        context = ocp.Context()
        # Called on process 0 when the files of all processes are there, before the folder takes
        # its name: a checkpoint without its record is one that was not finished.
        # A lambda, because contexts are copied deeply, and a bound method would take self along.
        context.async_options.post_finalization_callback = lambda: self._record()
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            str(self._folder),
            context=context,
            # Orbax's own policies do not fit its own protocol by their types.
            preservation_policy=policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, unchecked; None if there is none."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Start writing the state of this step; waits for the checkpoint before it, if any.

        The arrays are copied before this returns, so the state may be donated.

        Raises:
          OSError: this or the previous checkpoint could not be written.
        """
        content = _content(state, np.asarray(iterator.get_state()["next_index"], np.int32))
        with Checkpoints._turn:
            other = Checkpoints._writer
            if other is not None and other is not self:
                other._settle()
            Checkpoints._writer = self
            try:
                self._raise_settled()
                self._orbax.wait()  # it may still ask which step it is saving
                self._saving = int(state.step)
                self._orbax.save_checkpointables_async(self._saving, content, force=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise self._failure(error) from error

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
          OSError: it could not be written; nothing of it is left.
        """
        try:
            self._raise_settled()
            self._orbax.wait()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from error

    def _settle(self) -> None:
        """Let the save under way end, for another run; what went wrong is raised to its own."""
        try:
            self._orbax.wait()
        except (OSError, ValueError, RuntimeError) as error:
            self._error = error

    def _raise_settled(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _record(self) -> None:
        [folder] = self._folder.glob(f"{self._saving}{_UNFINISHED}*")
        write_checksums(folder, _PARTS)

    def restore_newest(
        self, abstract: TrainState, iterator: grain.DatasetIterator, model: DecoderConfig
    ) -> tuple[TrainState, int] | None:
        """State and step of the newest checkpoint that is as it was written, None if there is none.

        Every file is read and compared with its checksum, by all processes together. A damaged
        checkpoint is logged with its path and what is wrong with it, and once an older one has
        been restored its folder is renamed to `<step>.corrupt`, so that the step can be saved
        again; nothing is deleted.

        Args:
          abstract: as for `restore`.
          iterator: of the training data; moved only if a state is returned.
          model: as for `restore`.

        Raises:
          ValueError: there are checkpoints, and all of them are damaged: names each and why; or a
            parameter has another shape. Nothing is renamed.
        """
        bad: dict[Path, str] = {}
        for step in self._steps():
            path = self._folder / str(step)
            reason = _damage(path)
            if not reason:
                state = self._read(step, abstract, iterator, model)
                self._set_aside(bad)
                return state, step
            logger.warning("%s is damaged and left out: %s", path, reason)
            bad[path] = reason
        if bad:
            each = "; ".join(f"{path.name}/{reason}" for path, reason in bad.items())
            raise ValueError(f"{self._folder}: expected a checkpoint that is whole, got {each}")
        return None

    def restore(
        self, step: int, abstract: TrainState, iterator: grain.DatasetIterator, model: DecoderConfig
    ) -> TrainState:
        """State of a step, laid out as `abstract` says; moves the iterator to its next batch.

        Args:
          step: which checkpoint.
          abstract: shapes, dtypes and shardings, `sinkjax.train.step.abstract_state`; another mesh
            or dtype than the one saved is fine.
          iterator: of the training data.
          model: to check the parameters against.

        Raises:
          ValueError: a file of it is damaged; or a parameter has another shape: names the first
            that differs.
        """
        path = self._folder / str(step)
        reason = _damage(path)
        if reason:
            raise ValueError(f"{path}: expected a checkpoint that is whole, got {reason}")
        return self._read(step, abstract, iterator, model)

    def _read(
        self, step: int, abstract: TrainState, iterator: grain.DatasetIterator, model: DecoderConfig
    ) -> TrainState:
        path = self._folder / str(step)
        check_shapes(model, ocp.metadata(str(path), "params").metadata, source=str(path))
        # Shapes only: the number is read on the host.
        target = _content(
            abstract, jax.ShapeDtypeStruct((), np.int32, sharding=abstract.step.sharding)
        )
        found = self._orbax.load_checkpointables(step, target)
        train = found["train"]
        iterator.set_state({"next_index": int(train["next_batch"])})
        return TrainState(
            found["params"],
            train["opt_state"],
            train["step"],
            jax.random.wrap_key_data(train["key"]),
        )

    def _steps(self) -> list[int]:
        """Steps of the checkpoints that process 0 sees, newest first."""
        steps = np.array([found.step for found in self._orbax.checkpoints][::-1], np.int32)
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            steps = multihost_utils.broadcast_one_to_all(np.resize(steps, count))
        return [int(step) for step in steps]

    def _set_aside(self, paths: Collection[Path]) -> None:
        if not paths:
            return
        if jax.process_index() == 0:
            for path in paths:
                path.rename(_free(path.with_name(f"{path.name}.corrupt")))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("sinkjax: damaged checkpoints set aside")
        self._orbax.reload()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        try:
            with Checkpoints._turn:
                if Checkpoints._writer is self:
                    Checkpoints._writer = None
                self._orbax.close()
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax raises the same failure once more here.
            if not self._failed:
                raise self._failure(error) from error
        finally:
            logging.getLogger("absl").removeFilter(self._quiet)
            if self._failed:
                # The first failure is told while other files of the checkpoint are still written.
                end = time.monotonic() + _LATE_WRITES
                while time.monotonic() < end:
                    self._sweep()
                    time.sleep(0.1)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failure(self, error: Exception) -> Exception:
        self._failed = True
        self._sweep()
        return _as_os_error(error, self._folder)

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            for leftover in self._folder.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint: one answer for all processes, each of which reads a part."""
    count = jax.process_count()
    found = damage(path, share=(jax.process_index(), count))
    if count == 1:
        return found
    text = np.zeros(_LONGEST, np.uint8)
    letters = np.frombuffer(found.encode()[:_LONGEST], np.uint8)
    text[: len(letters)] = letters
    for row in multihost_utils.process_allgather(text):
        if row.any():
            return bytes(row).rstrip(b"\0").decode(errors="replace")
    return ""


_LONGEST = 512  # bytes of a reason


def _free(path: Path) -> Path:
    """The path, or with the first number that makes it free."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not name.exists())


def _content(state: TrainState, next_batch: Any) -> dict[str, Any]:
    # The iterator's state is one number, kept as an array: grain's own files are per process and
    # would tie the checkpoint to a number of processes.
    key = state.key
    if isinstance(key, jax.Array):
        key_data = jax.random.key_data(key)
    else:
        data = jax.eval_shape(jax.random.key_data, key)
        key_data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    train = {
        "opt_state": state.opt_state,
        "step": state.step,
        "key": key_data,
        "next_batch": next_batch,
    }
    return {"params": state.params, "train": train}


def _as_os_error(error: Exception, folder: Path) -> Exception:
    # tensorstore reports a full disk as a ValueError with the number of the system's error in it.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, f"checkpoint not written: {error.strerror}", str(folder))
    if number is None:
        return error
    reason = re.search(r": ([^:\[]*) \[os_error_code", str(error))
    text = reason.group(1) if reason else "cannot write"
    return OSError(int(number.group(1)), f"checkpoint not written: {text}", str(folder))


class _Quiet(logging.Filter):
    # Orbax logs an error with its traceback once for every thread it passes through; the error
    # itself is raised here.
    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)
