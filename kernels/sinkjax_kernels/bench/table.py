"""Aligned tables, and the same rows as lines of JSON."""

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any


def format_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text columns to the left, numbers to the right; None is a dash.

    Example:
      >>> print(format_table(["case", "cycles"], [["a", 1200], ["bcd", None]]))
      case  cycles
      a      1,200
      bcd        –
    """
    cells = [[_cell(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    is_text = [all(isinstance(row[n], str) for row in rows) for n in range(len(headings))]

    def line(parts):
        padded = [
            part.ljust(width) if text else part.rjust(width)
            for part, width, text in zip(parts, widths, is_text, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), *map(line, cells)])


def _cell(x: Any) -> str:
    if x is None:
        return "–"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def write_lines(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
