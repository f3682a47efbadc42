"""Optimised HLO as text, read into computations and instructions with shapes.

What the compiler prints is all there is without a device: `compiled.as_text()` can fail on asynchronous
collectives, the text that XLA dumps does not.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_LEAF = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a type.

    Args:
      dtype: as HLO names it.
      dims: its sizes.
      space: memory it lies in: 0 is HBM, 1 the vector memory of a TPU core, 5 the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def nbytes(self) -> int:
        """Without the padding of tiles."""
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return math.prod(self.dims) * bits // 8


def shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type, those of nested tuples in a row.

    >>> [(s.dims, s.space) for s in shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s32[])")]
    [((2, 3), 1), ((), 0)]
    """
    found = []
    for dtype, dims, layout in _LEAF.findall(text):
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Args:
      name: without the percent sign.
      type: of the result, as printed.
      opcode: such as `fusion`.
      operands: names.
      attributes: what follows the operands, as printed; for constants the value stands in front.
      root: it is the result of its computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of the result."""
        return shapes(self.type)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for the scalar ones of reductions."""
        if self.opcode not in ("fusion", "call", "while", "async-start", "conditional"):
            return ()
        if self.opcode == "conditional":
            parts = (a or b for a, b in _BRANCHES.findall(self.attributes))
            return tuple(name for part in parts for name in _NAME.findall(part))
        return tuple(_CALLED.findall(self.attributes))

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """Its result."""
        marked = [instruction for instruction in self.instructions if instruction.root]
        return (marked or self.instructions)[-1]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its arguments by number."""
        return {
            int(i.operands[0]): i
            for i in self.instructions
            if i.opcode == "parameter" and i.operands
        }

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """Arrays that an instruction is given."""
        known = (self.by_name.get(name) for name in instruction.operands)
        return tuple(shape for found in known if found is not None for shape in found.shapes)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and the one it starts with."""

    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What a fusion or an asynchronous start consists of, at any depth."""
        for called in instruction.called:
            computation = self.computations.get(called)
            if computation is None:
                continue
            for inner in computation.instructions:
                yield computation, inner
                yield from self.inside(inner)


def parse(text: str) -> Module:
    """Read a program.

    Args:
      text: as XLA dumps it, `*.after_optimizations.txt`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, rows = None, None, []
    for line in text.splitlines():
        if name is None:
            head = _HEAD.match(line)
            if head:
                name, rows = head.group(2), []
                entry = name if head.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(rows))
            name = None
        else:
            start = _LINE.match(line)
            if start:
                rows.append(_instruction(line, start))
    if entry not in computations:
        raise ValueError("text: expected HLO with an ENTRY computation, got none")
    return Module(computations, entry)


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    rest = line[start.end() :]
    end = _close(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, body = rest[:end], rest[end:].lstrip()
    opened = body.index("(")
    closed = _close(body, opened)
    opcode, given = body[:opened], body[opened + 1 : closed]
    operands = tuple(_NAME.findall(given)) or ((given,) if opcode == "parameter" else ())
    tail = body[closed + 1 :]
    if opcode == "constant":
        tail = f"{given}{tail}"
    return Instruction(start.group(2), kind, opcode, operands, tail, start.group(1) is not None)


def _close(text: str, opened: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text[opened:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return opened + found.start()
    return len(text) - 1
