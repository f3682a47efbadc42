"""What the commands share that stream to a terminal."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sinkjax.stream import Statistics

# What a byte model may send to a terminal by accident: all control characters but \t and \n.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(text: str) -> str:
    """The text without control characters."""
    return _CONTROL.sub("\ufffd", text)


def numbers(tokens: int, seconds: float, statistics: Statistics) -> str:
    """One line about a stream.

    Args:
      tokens: drawn; the first two bring the prompt and the compilations, and are not timed.
      seconds: since the second.
      statistics: of the last one.
    """
    words = [f"{tokens:,} tokens"]
    if tokens > 2:
        words.append(f"{(tokens - 2) / seconds:,.0f} tokens/s")
    words.append(f"{statistics.evicted:,} evicted")
    if statistics.dropped:
        words.append(f"{statistics.dropped:,} dropped")
    words.append(f"cache {statistics.cache_bytes:,} bytes in {statistics.cache_slots:,} slots")
    return ", ".join(words)


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.pressed = False
        self.waiting = False

    @contextmanager
    def may_break(self) -> Iterator[None]:
        """While a read waits, Ctrl-C raises `KeyboardInterrupt`: nothing would notice otherwise."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Let Ctrl-C be noted, so that a step in progress is finished; a second one raises.

    A step is donated its cache: an exception in the middle of it would leave none.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # signal handlers can be set in the main thread only
        return

    def handle(signum: int, frame: Any) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, previous)
        if interrupt.waiting:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
