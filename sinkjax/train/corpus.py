"""Documents: which files are read, which are held out."""

import dataclasses
import glob
import hashlib
import math
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sinkjax.typing import Tokenizer

# Folders of the standard library that hold tests or what somebody installed.
_NOT_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token ids of all documents, one after the other.

    Args:
      tokens: integer array [sum of lengths]; uint8 for bytes.
      offsets: int64 array [number of documents + 1]; document `i` is
        `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def find_files(patterns: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Text files named by paths, folders and globs.

    Args:
      patterns: what to read, of a folder every file that is not hidden; empty means every `.py`
        file of the running Python's standard library except its tests and what was installed
        beside it.

    Returns:
      A common root and the sorted names below it. Names, not paths, decide later order and
      split, so that moving the folder changes nothing.

    Raises:
      ValueError: a pattern names nothing.
    """
    if not patterns:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = (path.relative_to(root) for path in root.rglob("*.py"))
        return root, sorted(p.as_posix() for p in names if not _NOT_STDLIB & set(p.parts))
    paths: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
        elif path.exists():
            found = [path]
        else:
            matches = glob.glob(str(path), recursive=True)
            found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise ValueError(f"data.files: expected text files, {pattern!r} names none")
        paths.update(p.resolve() for p in found)
    root = Path(os.path.commonpath([p.parent for p in paths]))
    return root, sorted(p.relative_to(root).as_posix() for p in paths)


def read_documents(
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.05,
    max_bytes: int | None = None,
) -> tuple[Documents, Documents]:
    """Training and validation documents, one per file.

    Files are held out whole: ordered by a hash of their name, the first `validation_fraction` of
    them (at least one) are validation. A single file is split at its end instead.

    Args:
      patterns: see `find_files`.
      tokenizer: makes ids of the content.
      validation_fraction: share of the files held out.
      max_bytes: stop taking files, in hash order, once they hold this many bytes; None takes all.

    Returns:
      Training documents, validation documents.

    Raises:
      ValueError: a file cannot be read, or there is nothing in them; names the path.
    """
    root, names = find_files(patterns)
    names = [name for name in names if _size(root / name) > 0]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    if max_bytes is not None:
        sizes = np.cumsum([_size(root / name) for name in names])
        names = names[: int(np.searchsorted(sizes, max_bytes)) + 1]
    wanted = list(patterns) or [str(root)]
    if not names:
        raise ValueError(f"data.files: expected text, every file of {wanted} is empty")
    held_out = math.ceil(validation_fraction * len(names))
    if len(names) == 1:
        ids = _encode(root / names[0], tokenizer)
        held_out = math.ceil(validation_fraction * len(ids))
        if len(ids) < 2:
            raise ValueError(f"data.files: expected at least 2 tokens, {root / names[0]} has 1")
        return _documents([ids[:-held_out]]), _documents([ids[-held_out:]])
    held_out = min(held_out, len(names) - 1)
    parts = sorted(names[held_out:]), sorted(names[:held_out])
    train, validation = (_documents([_encode(root / n, tokenizer) for n in p]) for p in parts)
    return train, validation


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path} ({error.strerror})") from error


def _encode(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"data.files: cannot read {path} ({error.strerror})") from error
    ids = tokenizer.encode_bytes(content)
    return ids.astype(np.uint8) if tokenizer.vocab_size <= 257 else ids


def _documents(parts: list[np.ndarray]) -> Documents:
    lengths = np.asarray([len(part) for part in parts], np.int64)
    return Documents(np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)]))
