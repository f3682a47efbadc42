"""A second, tiny process that says why this one has ended, if it ended without a word."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any

# Says the last thing it was told, once the pipe is closed. Bytes that UTF-8 does not have set off
# what it is told from the numbers of signals that Python's own handlers put between
# (`signal.set_wakeup_fd`); an abort has a text of its own.
_WITNESS = """
import signal, sys
told, _, signals = sys.stdin.buffer.read().rpartition(b"\\xff")
aborted, killed = told.rpartition(b"\\xfe")[2].decode().split("\\0")
said = aborted if signal.SIGABRT in signals else killed
if said:
    print(said, file=sys.stderr)
"""


class Witness:
    """A process that says why this one has ended, if it ends too suddenly to say so itself."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WITNESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on the terminal is not for it
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self.says("", "")
        self._restore: tuple[Any, int] | None = None
        if threading.current_thread() is threading.main_thread():
            # The handler in C, which also runs in a thread of C++, writes the number to the pipe.
            previous = signal.signal(signal.SIGABRT, lambda *_: None)
            self._restore = previous, signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)

    def says(self, aborted: str, killed: str) -> None:
        """What to print from now on, on standard error, after an abort or another sudden end."""
        texts = (" ".join(text.split()).replace("\0", "") for text in (aborted, killed))
        with contextlib.suppress(OSError):  # somebody may have killed it
            os.write(self._pipe, b"\xfe" + "\0".join(texts).encode(errors="replace") + b"\xff")

    def dismiss(self) -> None:
        """End it without a word."""
        self.says("", "")
        if self._restore is not None:
            previous, descriptor = self._restore
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGABRT, signal.SIG_DFL if previous is None else previous)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
