"""The largest buffers of a program, by the compiler's own report or by its refusal."""

import dataclasses
import re

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = r"([\d.]+)\s*([KMG]i?B|[KMGB])"


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One stretch of memory.

    Args:
      nbytes: of it, as exact as the report.
      shapes: of what lies there, one after the other.
      source: the operation it comes from, where the report says so.
    """

    nbytes: int
    shapes: str
    source: str = ""


def largest(usage: str, refusal: str = "", count: int = 5) -> list[Buffer]:
    """The largest buffers, largest first.

    Args:
      usage: text of `*memory-usage-report.txt`.
      refusal: what the compiler said when it ran out of memory; goes before the report.
      count: how many.
    """
    found = _refused(refusal) or _reported(usage)
    return sorted(found, key=lambda buffer: -buffer.nbytes)[:count]


def refused_bytes(refusal: str) -> int | None:
    """What the temporaries of a program that does not fit would take, as the compiler says it."""
    found = re.search(rf"temporaries \({_SIZE}\) exceeds|Used {_SIZE} of", refusal)
    return _bytes(*(part for part in found.groups() if part)) if found else None


def laid_out_bytes(usage: str) -> int | None:
    """What arguments and temporaries take in HBM by the report, before machine code is made.

    `memory_analysis()` of the finished program says more: temporaries of 12.0 GB in place of 9.8 for
    the training step of 8B parameters on v5p:4x4x8.
    """
    found = re.search(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)", usage)
    return int(found.group(1)) if found else None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _reported(usage: str) -> list[Buffer]:
    found = []
    for line in usage.splitlines():
        parts = [part.strip() for part in line.split(";", 4)]
        if len(parts) == 5 and (size := re.fullmatch(_SIZE, parts[1])):
            found.append(Buffer(_bytes(*size.groups()), parts[4]))
    return found


def _refused(refusal: str) -> list[Buffer]:
    """`Size: 3.91G`, `Operator: op_name="..."` and `Shape: ...` of each; older libtpus write this."""
    found = []
    for part in re.split(r"\n\s*\d+\. (?=Size: )", refusal)[1:]:
        size = re.match(rf"Size: {_SIZE}", part)
        shape = re.search(r"Shape: (\S+)", part)
        source = re.search(r'op_name="([^"]*)"', part)
        if size:
            found.append(
                Buffer(
                    _bytes(*size.groups()),
                    shape.group(1) if shape else "",
                    source.group(1) if source else "",
                )
            )
    return found
