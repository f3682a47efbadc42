"""Writing a file whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> Path:
    """Write a text file under a temporary name and rename it.

    Whoever looks sees the old file or the new one, and a full disk leaves the old one.

    Args:
        path: where to; its folder is made if it is not there. text: what, as UTF-8.
    Returns:
        The path.
    Raises:
        OSError: with the path, also where the system's error has none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        # A full disk is reported without a name; say which file could not be written.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
