"""When a run ends before its last step: Ctrl-C, SIGTERM or an event, after one step for all processes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Stopping:
    """Tells the loop when to stop, and afterwards why.

    With `jax.distributed` initialised, SIGTERM is jax's: its preemption service hands the notice to
    all processes and has them agree on a step. What only one process knows of, Ctrl-C and the
    event, goes the same way.

    Args:
      event: ends the run when it is set; None makes one.
    """

    def __init__(self, event: threading.Event | None = None):
        self._event = event or threading.Event()
        self._preempted = threading.Event()
        self._joint = jax.distributed.is_initialized()
        self._passed_on = False

    def after(self, step: int) -> bool:
        """Whether this step is the last; to be asked once for every step, by all processes."""
        if not self._joint:
            return self._event.is_set() or self._preempted.is_set()
        if self._event.is_set() and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def interrupted(self) -> bool:
        """Ctrl-C on this process, or the event, was the reason, and not a SIGTERM."""
        return self._event.is_set() and not self._preempted.is_set()

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C stops the run, a second one raises as usual."""
        with _first(signal.SIGINT, self._event.set):
            yield

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """The first SIGTERM stops the run, a second one ends the process."""
        if self._joint:
            yield
            return
        with _first(signal.SIGTERM, self._preempted.set):
            yield


@contextmanager
def _first(number: signal.Signals, act: Callable[[], None]) -> Iterator[None]:
    """Let the first signal act; from then on, and at the end, it does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can be set in the main thread only
        return

    def handle(*_: object) -> None:
        act()
        signal.signal(number, before)

    # None is a handler that Python did not set.
    before = signal.signal(number, handle) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(number, before)
