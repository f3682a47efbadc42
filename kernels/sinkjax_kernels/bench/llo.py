"""The TPU compiler's final schedule of one kernel, read from its dump.

`LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"` makes the compiler write it: a text
of bundles, each a set of instructions that issue in one cycle, and a table of how much of each unit a
bundle uses. The format is not documented; what is not understood here raises `ScheduleError`.
"""

import collections
import dataclasses
import pathlib
import re

DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    # All passes of one program are 400 MB of text; these are its last.
    "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|final_hlo-static-per-bundle).*"
)

_BUNDLE = re.compile(
    r"^\s*(0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT)\s*)?:\s*(?:>\s*)*\{", re.MULTILINE
)
_CORE = re.compile(r"= sld \[smem:\[[^\]]*\]\] /\* core id \*/")
_LONGEST_DELAY = 6  # where each jump has its own
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"End region (\d+)")
_STATEMENT = re.compile(r"%(\w+) = (\S+)\s*(.*)", re.DOTALL)
_PREDICATED = re.compile(r"\((!?)%(\w+)(?:,\s*([^)\s]+))?\)(?:,\s*)?")


class ScheduleError(Exception):
    """A schedule that this code cannot count, with what it met and where."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One scalar instruction.

    Args:
        name: of its result; unique, for the text is in static single assignment form.
        op: its mnemonic.
        operands: names of values with `%`, numbers, memory cells as `[smem:…]`.
        predicate: whether it happens: (name, expected value), or None.
        otherwise: the result where it does not happen.
    """

    name: str
    op: str
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None
    otherwise: str | None = None


@dataclasses.dataclass(frozen=True)
class Branch:
    """A jump from a bundle to another, if a predicate has some value; bundles before `end` still run."""

    bundle: int
    end: int
    target: int
    predicate: tuple[str, bool] | None


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel's bundles, and of them what decides how often each runs.

    Args:
        name: of the kernel.
        size: number of bundles.
        branches: by the bundle after their delay.
        loop_heads: bundles where a loop's body begins.
        control: instructions that branches depend on, by bundle.
        matmuls: matrix instructions of each bundle.
        spills: vector registers written to memory for want of registers, of each bundle.
    """

    name: str
    size: int
    branches: dict[int, Branch]
    loop_heads: frozenset[int]
    control: dict[int, tuple[Instruction, ...]]
    matmuls: tuple[int, ...]
    spills: tuple[int, ...]


def parse(name: str, bundles: str, utilization: str, delay: int | None = 4) -> Program:
    """The program of a `…final_bundles.txt` and its `…final_hlo-static-per-bundle-utilization.txt`.

    Args:
        delay: bundles that run after a jump, taken or not; None is for each its own.

    Raises:
        ScheduleError: they do not look as expected.
    """
    found = list(_BUNDLE.finditer(bundles))
    if not found:
        raise ScheduleError(f"{name}: no bundles in the final schedule")
    texts = [
        bundles[m.end() : following.start() if following else len(bundles)]
        for m, following in zip(found, [*found[1:], None], strict=True)
    ]
    for n, m in enumerate(found):
        if int(m[1], 16) != n:
            raise ScheduleError(f"{name}: bundle {n} is numbered {m[1]}")
    regions: dict[str, int] = {}
    instructions: dict[str, Instruction] = {}
    where: dict[str, int] = {}
    stores: dict[str, list[Instruction]] = collections.defaultdict(list)
    jumps = []
    matmuls = []
    for n, text in enumerate(texts):
        regions.update((region, n) for region in _REGION.findall(text))
        if n + 1 < len(found) and found[n + 1][2] == "PF":
            # What an unnamed region falls through to has the number after its own.
            for region in _END.findall(text):
                regions.setdefault(str(int(region) + 1), n + 1)
        matmuls.append(text.count("vmatmul"))
        text = _CORE.sub("= core_id", text)
        for statement in _COMMENT.sub("", text).split(";;"):
            one = _instruction(statement)
            if one is None:
                continue
            instructions[one.name], where[one.name] = one, n
            if one.op == "sst":
                stores[one.operands[0]].append(one)
            elif one.op.startswith("sbr") or "call" in one.op:
                jumps.append((n, one))
    branches = {}
    for n, one in jumps:
        target = re.search(r"target = \$region(\d+)", " ".join(one.operands))
        if one.op != "sbr.rel" or target is None or target[1] not in regions:
            raise ScheduleError(f"{name}: jump {one.op} {one.operands} at bundle {n:#x}")
        to = regions[target[1]]
        end = n + 1 + (_delay(name, found, texts, n, one, to) if delay is None else delay)
        branches[end] = Branch(n, end, to, one.predicate)
    for one in branches.values():
        inside = range(one.bundle + 1, one.end)
        if any(other.bundle in inside or other.target in inside for other in branches.values()):
            raise ScheduleError(
                f"{name}: a jump within the delay of that at bundle {one.bundle:#x}"
            )
    control = _control(name, branches, instructions, where, stores)
    heads = frozenset(b.target for b in branches.values() if b.target <= b.bundle)
    return Program(
        name, len(texts), branches, heads, control, tuple(matmuls), _spills(name, utilization, len(texts))
    )  # fmt: skip


def _delay(
    name: str, found: list[re.Match], texts: list[str], n: int, jump: Instruction, to: int
) -> int:
    """Bundles after the jump at n that run whether it is taken or not: six, or up to an empty one.

    They are what is left of the jump's block, up to the end of a region (of several, the last, or at the end
    of a loop the first), and then what the next block has begun early, under the opposite predicate. How
    many cycles the empty bundle waits for is not in the text; it counts as one.

    Raises:
        ScheduleError: what follows is neither, and no empty bundle is before it.
    """
    most = next(
        (k for k in range(1, _LONGEST_DELAY + 1)
         if n + k in (to, len(texts)) or found[n + k][2] or _REGION.search(texts[n + k])),
        _LONGEST_DELAY + 1,
    ) - 1  # fmt: skip
    ends = [k for k in range(most + 1) if _END.search(texts[n + k]) and n + k + 1 != to]
    delay = (ends[0] if to <= n else ends[-1]) if ends else 0
    value, expected = jump.predicate or ("", False)
    guard = f"({'!' if expected else ''}%{value})"
    is_closed = False
    for k in range(delay + 1, most + 1):
        statements = [x.strip("} \n") for x in _COMMENT.sub("", texts[n + k]).split(";;")]
        if statements == [""]:
            delay, is_closed = k, True
        elif not all(guard in x or "= int_to_ptr" in x for x in statements):
            break
        elif k == _LONGEST_DELAY:
            delay, is_closed = k, True
    if not is_closed and delay < _LONGEST_DELAY:
        raise ScheduleError(f"{name}: no end of the delay of the jump at bundle {n:#x}")
    return delay


def _instruction(statement: str) -> Instruction | None:
    """Scalar instructions and jumps; vector ones decide nothing."""
    statement = statement.strip().rstrip("} \n")
    m = _STATEMENT.match(statement)
    if m is None:
        return None
    name, op, rest = m.groups()
    if op[0] not in "sp" and op not in ("int_to_ptr", "core_id"):
        return None
    predicate = otherwise = None
    guard = _PREDICATED.match(rest)
    if guard:
        predicate, otherwise = (guard[2], guard[1] != "!"), guard[3]
        rest = rest[guard.end() :]
    if op == "sbr.rel":
        operands = (rest,)
    elif op == "sst":
        cell, _, value = rest.rpartition(" ")
        operands = (cell.strip(), value)
    else:
        operands = tuple(x.strip() for x in rest.split(","))
    return Instruction(name, op, operands, predicate, otherwise)


def _control(name, branches, instructions, where, stores) -> dict[int, tuple[Instruction, ...]]:
    """The instructions that the branches depend on, directly or through spilled scalars."""
    needed: set[str] = set()
    ahead = [b.predicate[0] for b in branches.values() if b.predicate]
    while ahead:
        value = ahead.pop()
        if value in needed:
            continue
        if value not in instructions:
            needed.add(value)  # a vector made it: unknown when it is asked for
            continue
        needed.add(value)
        one = instructions[value]
        used = (*one.operands, one.otherwise or "")
        ahead += [x[1:] for x in used if x.startswith("%")]
        if one.predicate:
            ahead.append(one.predicate[0])
        if one.op == "sld":
            for store in stores.get(one.operands[0], ()):
                needed.add(store.name)
                ahead += [store.operands[1][1:]] if store.operands[1].startswith("%") else []
                ahead += [store.predicate[0]] if store.predicate else []
    control = collections.defaultdict(list)
    for value, one in instructions.items():  # in the order of the text
        if value in needed:
            control[where[value]].append(one)
    return {n: tuple(ones) for n, ones in control.items()}


def _spills(name: str, utilization: str, size: int) -> tuple[int, ...]:
    lines = [line.strip() for line in utilization.splitlines()]
    starts = [n for n, line in enumerate(lines) if line.startswith("== UTIL")]
    header = next((line for line in lines if "VSTORE:SPILL" in line), None)
    if len(starts) != 1 or header is None:
        raise ScheduleError(f"{name}: no table of utilization with VSTORE:SPILL")
    column = [x.strip() for x in header.split(",")].index("VSTORE:SPILL")
    rows = [line.split() for line in lines[starts[0] + 1 :] if line]
    if len(rows) != size:
        raise ScheduleError(f"{name}: {size} bundles, but {len(rows)} rows of utilization")
    return tuple(int(row[column]) for row in rows)


def read(folder: pathlib.Path, delay: int | None = 4) -> list[Program]:
    """All kernels and fusions whose schedules lie in a folder, in the order of their compilation."""
    programs = []
    for path in sorted(folder.glob("*final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        stamp, name, number, _ = re.fullmatch(
            r"(\d+)-(.*)-(\d+)-(final_bundles)\.txt", path.name
        ).groups()  # type: ignore[union-attr]
        if name == "TLP" or name.startswith("<"):
            continue  # the program that calls the kernels, and what surrounds it
        tables = list(folder.glob(f"{stamp}-{name}-*-final_hlo-static-per-bundle-utilization.txt"))
        if len(tables) != 1:
            raise ScheduleError(f"{name}: {len(tables)} tables of utilization beside {path.name}")
        programs.append(parse(name, path.read_text(), tables[0].read_text(), delay))
    return programs
