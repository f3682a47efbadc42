"""Files that are whole or not there: whoever looks sees the old one or the new one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes its name only once everything is on the disk.

    Args:
      path: where to; its folder is made if it is not there.

    Raises:
      OSError: it cannot be written; names the path, also where the system's error has none. An
        older file under that name is untouched, and nothing else is left behind.
    """
    path = Path(path)
    # In the same folder: a rename across file systems would be a copy. Hosts that share it may have
    # processes of the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            # The first error is the one to tell: below a file there is nothing to remove either.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:  # numpy counts what a full disk took, and forgets the number
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file whole or not at all.

    Args:
      path: where to; its folder is made if it is not there.
      content: what; a text is written as UTF-8 with its line ends as they are.

    Returns:
      The path.

    Raises:
      OSError: as `open_whole`.
    """
    with open_whole(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)
