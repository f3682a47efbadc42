"""Walks a schedule from its first bundle to its last, and counts how often each bundle runs.

Grid bounds, loop bounds and block indices are scalars that the schedule computes itself, so the walk does
what the chip's scalar unit would: it needs no model of the kernel, and counts every step, specialised
body and loop turn as often as it happens. Waiting (for memory, for instructions) is not in a schedule.

A branch that depends on data (a table in memory, a vector) cannot be followed. It has to skip forward;
the walk skips, and reports what it left out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from sinkjax_kernels.bench.llo import Instruction, Program, ScheduleError

_MASK = 0xFFFFFFFF


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 32) if x >> 31 else x


_OPS: dict[str, Callable[..., int | bool]] = {
    "smov": lambda a: a,
    "int_to_ptr": lambda a: a,
    "sadd.s32": lambda a, b: a + b,
    "ssub.s32": lambda a, b: a - b,
    "smul.u32": lambda a, b: a * b,
    "smul.s32": lambda a, b: a * b,
    "sand.u32": lambda a, b: a & b,
    "sor.u32": lambda a, b: a | b,
    "sxor.u32": lambda a, b: a ^ b,
    "sshll.u32": lambda a, b: (a & _MASK) << (b & 31),
    "sshrl.u32": lambda a, b: (a & _MASK) >> (b & 31),
    "sshra.s32": lambda a, b: _signed(a) >> (b & 31),
    "smin.u32": lambda a, b: min(a & _MASK, b & _MASK),
    "smax.u32": lambda a, b: max(a & _MASK, b & _MASK),
    "smin.s32": lambda a, b: min(_signed(a), _signed(b)),
    "smax.s32": lambda a, b: max(_signed(a), _signed(b)),
    "pand": lambda a, b: bool(a) and bool(b),
    "por": lambda a, b: bool(a) or bool(b),
    "pxor": lambda a, b: bool(a) != bool(b),
    "pnand": lambda a, b: not (a and b),
    "pnor": lambda a, b: not (a or b),
    "pneg": lambda a: not a,
    "pmov": lambda a: bool(a),
    "scalar_select": lambda p, a, b: a if p else b,
}
for _name, _compare in {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}.items():
    _OPS[f"scmp.{_name}.s32.totalorder"] = lambda a, b, c=_compare: c(_signed(a), _signed(b))
    _OPS[f"scmp.{_name}.u32.totalorder"] = lambda a, b, c=_compare: c(a & _MASK, b & _MASK)

MOST_BLOCKS = 20_000_000


@dataclasses.dataclass(frozen=True)
class Straight:
    """Bundles [start, end) that run one after the other, and how often they did."""

    start: int
    end: int
    runs: int
    matmuls: int

    @property
    def bundles(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A part that runs or not depending on data: [start, end), and how often it was come by."""

    start: int
    end: int
    reached: int
    matmuls: int

    @property
    def bundles(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Walk:
    """What a program does in one call.

    Args:
        cycles: bundles run, data-dependent parts left out.
        parts: straight pieces of the program, each with its number of runs.
        skipped: data-dependent parts.
        steps: bundles of each turn of the outermost loop, which is the grid.
    """

    program: Program
    cycles: int
    parts: tuple[Straight, ...]
    skipped: tuple[Skipped, ...]
    steps: tuple[int, ...]

    @property
    def tiles(self) -> tuple[Straight, ...]:
        """The pieces with matrix work that ran."""
        return tuple(p for p in self.parts if p.matmuls and p.runs)


def walk(program: Program, cores: int = 1) -> Walk:
    """Follows the scalars of a program to its end, on each of the cores that share a call; counts are sums.

    Raises:
        ScheduleError: an instruction that decides a branch is not known, or a branch on data does not
            skip a straight piece.
    """
    walks = [_walk(program, core) for core in range(cores)]
    if cores == 1:
        return walks[0]
    skipped: dict[tuple[int, int], Skipped] = {}
    for one in (s for w in walks for s in w.skipped):
        known = skipped.get((one.start, one.end))
        reached = one.reached + (known.reached if known else 0)
        skipped[one.start, one.end] = dataclasses.replace(one, reached=reached)
    return Walk(
        program,
        sum(w.cycles for w in walks),
        tuple(
            dataclasses.replace(same[0], runs=sum(p.runs for p in same))
            for same in zip(*(w.parts for w in walks), strict=True)
        ),
        tuple(skipped.values()),
        tuple(x for w in walks for x in w.steps),
    )


def _walk(program: Program, core: int) -> Walk:
    cuts = {0, program.size} | {b.target for b in program.branches.values()}
    cuts |= set(program.branches)
    edges = sorted(cuts)
    ends = dict(zip(edges, edges[1:], strict=False))
    outer = min(program.loop_heads, default=None)
    state = _Scalars(program, core)
    runs = dict.fromkeys(ends, 0)
    reached: dict[tuple[int, int], int] = {}
    steps: list[int] = []
    cycles = at = total = 0
    is_back = False
    while at < program.size:
        total += 1
        if total > MOST_BLOCKS:
            raise ScheduleError(f"{program.name}: no end after {MOST_BLOCKS} pieces")
        if at == outer:
            steps.append(0)
        end = ends[at]
        runs[at] += 1
        cycles += end - at
        if steps:
            steps[-1] += end - at
        branch = program.branches.get(end)
        taken = state.run(at, end, is_back, branch)
        is_back = False
        if branch is None or taken is False:
            at = end
            continue
        if taken is None:
            if branch.target <= end or any(end < x < branch.target for x in edges):
                raise ScheduleError(
                    f"{program.name}: the branch at bundle {branch.bundle:#x} depends on data and does "
                    "not skip a straight piece"
                )
            key = (end, branch.target)
            reached[key] = reached.get(key, 0) + 1
        is_back = branch.target <= branch.bundle
        at = branch.target

    def work(start, end):
        return sum(program.matmuls[start:end])

    return Walk(
        program,
        cycles,
        tuple(Straight(a, b, runs[a], work(a, b)) for a, b in ends.items()),
        tuple(Skipped(a, b, n, work(a, b)) for (a, b), n in reached.items()),
        tuple(steps),
    )


class _Scalars:
    """Values of a program's control instructions; None is a value that only the data know."""

    def __init__(self, program: Program, core: int):
        self.program, self.core = program, core
        self.values: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}

    def run(self, start: int, end: int, is_back: bool, branch) -> bool | None:
        """Runs the bundles [start, end); whether the branch among them is taken."""
        taken: bool | None = False
        for n in range(start, end) if self.program.control else ():
            ones = self.program.control.get(n)
            if ones:
                self._bundle(n, ones, is_back and n == start)
            if branch is not None and n == branch.bundle:
                taken = self._holds(branch.predicate)
        return taken

    def _bundle(self, n: int, ones: tuple[Instruction, ...], is_back: bool) -> None:
        merged = {}
        for one in ones:  # all at once: one may be the other's operand
            if one.op == "sphi":
                if n not in self.program.loop_heads or len(one.operands) != 2:
                    raise ScheduleError(f"{self.program.name}: sphi outside a loop head, at {n:#x}")
                merged[one.name] = self._value(one.operands[1 if is_back else 0])
        self.values.update(merged)
        for one in ones:
            if one.op == "sphi":
                continue
            holds = self._holds(one.predicate)
            if one.op == "sst":
                if holds is not False:
                    value = self._value(one.operands[1])
                    self.memory[one.operands[0]] = value if holds else None
            elif holds:
                self.values[one.name] = self._result(n, one)
            elif holds is None:
                self.values[one.name] = None
            elif one.otherwise is not None:
                self.values[one.name] = self._value(one.otherwise)

    def _holds(self, predicate: tuple[str, bool] | None) -> bool | None:
        if predicate is None:
            return True
        value = self.values.get(predicate[0])
        return None if value is None else bool(value) == predicate[1]

    def _value(self, operand: str) -> Any:
        if operand.startswith("%"):
            return self.values.get(operand[1:])
        return int(operand, 0)

    def _result(self, n: int, one: Instruction) -> Any:
        if one.op == "core_id":
            return self.core
        if one.op == "sld":
            return self.memory.get(one.operands[0])
        operands = [self._value(x) for x in one.operands]
        if None in operands:
            return None
        if one.op not in _OPS:
            raise ScheduleError(
                f"{self.program.name}: a branch depends on {one.op} {one.operands} at bundle {n:#x}, "
                "which is not known"
            )
        result = _OPS[one.op](*operands)
        return result if isinstance(result, bool) else result & _MASK
