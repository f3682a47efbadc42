"""A record of sizes and checksums, so that a folder whose files changed since is found out.

File systems and stores pass flipped bits on silently: tensorstore checks its own index, but not
the numbers in the arrays (seen with 0.1.86: every bit flipped there went unnoticed).
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sinkjax.files import write_whole

RECORD = "checksums.json"


def write_checksums(folder: Path, parts: Iterable[str]) -> Path:
    """Record size and CRC-32 of every file below `folder/part`, in `folder/checksums.json`.

    Reading is all that takes time, and it waits outside the interpreter's lock: whatever runs
    beside it goes on.

    Args:
      folder: which.
      parts: folders in it whose files are finished.

    Returns:
      Path of the record.

    Raises:
      OSError: a file cannot be read or the record not written; names the path.
    """
    paths = sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(_crc32, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = dict(zip(names, found, strict=True))
    record = {"size and crc32": files, "crc32 of them": _crc32_of_record(files)}
    return write_whole(folder / RECORD, json.dumps(record, indent=1))


def damage(folder: Path, *, part: str = "", share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a folder, by its record; the empty text if nothing is.

    Args:
      folder: which.
      part: only the files whose path in it starts so; all by default.
      share: (i, n) reads the i-th of n shares of the files, for n processes that check together.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        files, crc = record["size and crc32"], record["crc32 of them"]
        wanted = {name: (int(size), int(crc)) for name, (size, crc) in files.items()}
    except OSError as error:
        return f"{RECORD}, which is written last: {error.strerror}"
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return f"{RECORD}: expected a record of files, got something else"
    if crc != _crc32_of_record(wanted):
        return f"{RECORD}: expected another CRC-32 of the record itself than {crc}"
    names = [name for name in sorted(wanted) if name.startswith(part)][share[0] :: share[1]]

    def check(name: str) -> str:
        try:
            size, crc = _crc32(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != wanted[name][0]:
            return f"{name}: expected {wanted[name][0]} bytes, got {size}"
        if crc != wanted[name][1]:
            return f"{name}: expected CRC-32 {wanted[name][1]:08x}, got {crc:08x}"
        return ""

    with ThreadPoolExecutor(_READERS) as pool:
        return next(filter(None, pool.map(check, names)), "")


# Enough to keep a disk busy; Orbax cuts what it writes into files of 2 GB at most.
_READERS = 8
_BLOCK = 1 << 22


def _crc32_of_record(files: Mapping[str, tuple[int, int]]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def _crc32(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = crc = 0
    block = memoryview(bytearray(min(_BLOCK, path.stat().st_size + 1)))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
            size += count
    return size, crc
