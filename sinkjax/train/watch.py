"""How the processes of a run end together: who was lost or failed is told by every one of them.

jax by itself aborts the survivors of a lost process with a stack of C++ frames; a process that
merely failed leaves the others waiting in a collective. Here a thread of every process beats in the
key-value store of jax's coordination service, which process 0 keeps and reads. Silence, or the word
of a process that failed, becomes a verdict that all processes print before they end. What leaves no
time for that, such as an abort because process 0 itself has gone, is told by a `Witness`.
"""

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from sinkjax.train.witness import Witness

logger = logging.getLogger("sinkjax.train")

_BEATS, _END = "sinkjax/beats/", "sinkjax/end/"
_DONE = "done"
_BEATS_PER_TIMEOUT = 15
_GO_ON = "the same command goes on from the last checkpoint"
_UNREACHABLE = (RuntimeError, ValueError)  # what jax raises for a failed call


class Watch:
    """Looks after the other processes, from when jax is initialised until `done` or `fail`.

    Args:
      witness: of this process.
      timeout: seconds of silence after which a process is lost.
    """

    def __init__(self, witness: Witness, timeout: float):
        self._witness, self._timeout = witness, timeout
        self._period = timeout / _BEATS_PER_TIMEOUT
        self._me, self._count = jax.process_index(), jax.process_count()
        self._name = f"sinkjax: process {self._me} of {self._count}"
        whom = "another process" if self._me == 0 else "process 0, to which all others report,"
        witness.says(
            f"{self._name} stops: {whom} has ended or cannot be reached; {_GO_ON}",
            f"{self._name} was killed, ran out of memory or crashed; {_GO_ON}",
        )
        # jax gives no public way to the store itself.
        state = getattr(vars(multihost_utils).get("distributed"), "global_state", None)
        self._store: Any = getattr(state, "client", None)
        # Held by whoever ends this process: the main thread through `done` or `fail`, or the watch.
        self._ending = threading.Lock()
        self._over = threading.Event()
        if self._store is None:
            logger.warning(
                "this jax hides its key-value store: a lost process is told by jax alone"
            )
        else:
            threading.Thread(target=self._watch, name="sinkjax watch", daemon=True).start()

    def done(self) -> None:
        """This process has nothing more to do: wait for the others, and leave together."""
        with self._ending:
            self._over.set()
        self._tell(f"{_BEATS}{self._me}", _DONE)
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends; returns when all have heard it.

        An error of jax may be the echo of what happened to another process: the verdict about that
        is waited for, and ends this process.
        """
        if self._count > 1 and _of_jax(error):
            time.sleep(self._timeout + 5 * self._period)
        with self._ending:
            self._over.set()
        said = " ".join(f"{type(error).__name__}: {error}".split())
        self._witness.says(*[f"{self._name} stops: {said}"] * 2)
        self._tell(f"{_END}{self._me}", f"process {self._me} failed ({said}); once that is mended")
        with contextlib.suppress(*_UNREACHABLE):  # the error itself matters more
            jax.distributed.shutdown()

    def _tell(self, key: str, text: str) -> None:
        # With process 0 gone there is nobody to tell, and jax ends this process.
        with contextlib.suppress(AttributeError, *_UNREACHABLE):
            self._store.key_value_set(key, text, allow_overwrite=True)

    def _watch(self) -> None:
        heard: dict[int, tuple[str, int]] = dict.fromkeys(range(self._count), ("", 0))
        for number in itertools.count(1):
            if self._over.wait(self._period):
                return
            try:
                with self._ending:
                    if self._over.is_set():
                        return  # `done` has written the last beat
                    self._store.key_value_set(
                        f"{_BEATS}{self._me}", str(number), allow_overwrite=True
                    )
                verdicts = self._store.key_value_dir_get(_END)
                if self._me == 0 and not verdicts:
                    verdicts = self._lost(heard, number)
            except _UNREACHABLE:
                continue  # process 0 is gone, then jax ends this process; or the network stutters
            if verdicts:
                self._end(*min(verdicts))

    def _lost(self, heard: dict[int, tuple[str, int]], number: int) -> list[tuple[str, str]]:
        """The verdict about processes that were not heard of for too long, written down; or none.

        Time is counted in beats of process 0: it may have been stopped itself.
        """
        for key, text in self._store.key_value_dir_get(_BEATS):
            process = int(key.rpartition("/")[2])
            if text != heard[process][0]:
                heard[process] = text, number
        late = number - _BEATS_PER_TIMEOUT
        lost = [i for i, (text, when) in heard.items() if text != _DONE and when < late]
        if not lost:
            return []
        who = f"process {lost[0]} was" if len(lost) == 1 else f"processes {lost} were"
        verdict = f"{_END}lost", f"{who} not heard of for {self._timeout:g} s;"
        self._store.key_value_set(*verdict)
        return [verdict]

    def _end(self, key: str, verdict: str) -> None:
        """Print a verdict and end this process, whatever its main thread waits for."""
        with self._ending:
            if self._over.is_set():
                return
            # The progress line hides the cursor, and stands where this goes.
            free = "\x1b[?25h\n" if sys.stderr.isatty() else ""
            print(f"{free}{self._name} stops: {verdict} {_GO_ON}", file=sys.stderr)
            self._witness.says("", "")
            try:
                if key.endswith("lost"):
                    if self._me == 0:
                        time.sleep(3 * self._period)  # the others shall hear it first
                else:
                    jax.distributed.shutdown()  # together with the one that failed
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)


def _of_jax(error: BaseException | None) -> bool:
    """Whether jax raised it, or what it was raised for: collectives on CPU raise a ValueError."""
    if error is None:
        return False
    found = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return found or _of_jax(error.__cause__ or error.__context__)
