"""What a program sends between devices: how often, how many bytes, and what hides behind arithmetic."""

import dataclasses
import re
from collections.abc import Iterator

from sinkjax.plan.hlo import Computation, Instruction, Module
from sinkjax.plan.loops import runs

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The TPU compiler cuts a collective into steps that ride along in the fusions of matrix products.
_IN_STEPS = "async_collective_fusion_config"
FIRST_STEP = '"flag_start":"-1"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One place in the program where devices exchange something.

    Args:
      kind: one of `KINDS`.
      times: how often it runs in one run of the program.
      nbytes: that one device sends each time, over rings as large as the group.
      asynchronous: other work may run before it is done.
      overlapped: matrix products or kernels do run between its start and its end.
      source: the operation of the model that it comes from.
    """

    kind: str
    times: float
    nbytes: float
    asynchronous: bool
    overlapped: bool
    source: str = ""


def collectives(module: Module) -> list[Collective]:
    """All of them; a start and its end are one, and so are the steps that one was cut into."""
    return [
        found for computation, times in runs(module) for found in _in(module, computation, times)
    ]


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """By kind: `count` and `bytes` of one device in one run, and of these `asynchronous` and `overlapped`.

    Args:
      found: by `collectives`.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        some = [one for one in found if one.kind == kind]
        if not some:
            continue
        row: dict[str, float] = {}
        for prefix, part in (
            ("", some),
            ("asynchronous_", [one for one in some if one.asynchronous]),
            ("overlapped_", [one for one in some if one.overlapped]),
        ):
            row[f"{prefix}count"] = round(sum(one.times for one in part))
            row[f"{prefix}bytes"] = round(sum(one.times * one.nbytes for one in part))
        table[kind] = row
    return table


def _in(module: Module, computation: Computation, times: float) -> Iterator[Collective]:
    """Those of one computation and the fusions in it."""
    rows = computation.instructions
    works = [is_work(module, row) for row in rows]
    chains: dict[str, list[int]] = {}
    members: dict[str, tuple[Computation, Instruction]] = {}
    for place, row in enumerate(rows):
        kind = row.opcode.removesuffix("-start")
        if kind in KINDS:
            asynchronous = row.opcode.endswith("-start")
            hidden = asynchronous and any(works[place + 1 : _end(rows, place)])
            yield _collective(computation, row, kind, times, asynchronous, hidden)
        elif row.opcode == "async-start":
            for inner, found in module.inside(row):
                if found.opcode in KINDS:
                    hidden = any(works[place + 1 : _end(rows, place)])
                    yield _collective(inner, found, found.opcode, times, True, hidden)
        elif row.opcode == "fusion":
            for inner, found in module.inside(row):
                if found.opcode not in KINDS:
                    continue
                if _IN_STEPS in found.attributes:
                    chain = f"{found.opcode} {found.attribute(r'channel_id=([0-9]+)')}"
                    chains.setdefault(chain, []).append(place)
                    if FIRST_STEP in found.attributes:
                        members.setdefault(chain, (inner, found))
                else:
                    scatters = found.opcode == "all-reduce" and "scatter" in inner.name
                    kind = "reduce-scatter" if scatters else found.opcode
                    yield _collective(inner, found, kind, times, False, False)
    # A chain without its first step goes on here, in a loop that runs beside it.
    for chain, (inner, found) in members.items():
        places = chains[chain]
        hidden = any(works[places[0] : places[-1] + 1])
        yield _collective(inner, found, found.opcode, times, True, hidden)


def is_work(module: Module, row: Instruction) -> bool:
    """Whether an instruction keeps the matrix unit busy: products, kernels, loops of them."""
    if row.opcode in ("convolution", "dot", "ragged-dot"):
        return True
    if row.opcode == "custom-call":
        return "tpu_custom_call" in row.attributes
    return any(is_work(module, inner) for _, inner in module.inside(row))


def _end(rows: tuple[Instruction, ...], place: int) -> int:
    """Where what starts at `place` is done; behind the last row if that is in the next round."""
    names = {rows[place].name}
    for later in range(place + 1, len(rows)):
        if names & set(rows[later].operands):
            if rows[later].opcode.endswith("-done"):
                return later
            if rows[later].opcode.endswith("-update"):
                names.add(rows[later].name)
    return len(rows)


def _collective(
    computation: Computation,
    row: Instruction,
    kind: str,
    times: float,
    asynchronous: bool,
    overlapped: bool,
) -> Collective:
    size = sum(shape.nbytes for shape in computation.operand_shapes(row))
    n = group_size(row)
    sent = {
        "all-gather": size * (n - 1),
        "all-reduce": 2 * size * (n - 1) / n,
        "reduce-scatter": size * (n - 1) / n,
        "all-to-all": size * (n - 1) / n,
        "ragged-all-to-all": size * (n - 1) / n,
    }.get(kind, size)
    source = row.attribute(r'op_name="([^"]*)"') or ""
    return Collective(kind, times, sent, asynchronous, overlapped, source)


def group_size(row: Instruction) -> int:
    """Devices that take part in one exchange; 1 where the text does not say.

    It is written as a list, as `[groups,size]<=[devices]`, or as axes of a mesh.
    """
    text = row.attributes
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        size = 1
        for axis in re.findall(r"'(\w+)'", mesh.group(2)):
            size *= int(sizes[axis])
        return size
    found = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if found:
        return int(found.group(1))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(found.group(1).split(",")) if found else 1
