"""What one device computes and moves through its memory in one run of a program."""

import math
import re
from collections.abc import Sequence

from sinkjax.plan.collectives import FIRST_STEP, KINDS
from sinkjax.plan.hlo import Computation, Instruction, Module
from sinkjax.plan.loops import runs

_NOTHING_MOVES = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call",
    "after-all", "iota", "partition-id", "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def flops(module: Module) -> float:
    """Multiplications and additions of matrix products, convolutions and kernels, on one device.

    A kernel counts as what its author estimates.
    """
    return sum(
        times * (_flops(computation, row) + sum(_flops(c, r) for c, r in _fused(module, row)))
        for computation, times in runs(module)
        for row in computation.instructions
    )


def _fused(module: Module, row: Instruction) -> Sequence[tuple[Computation, Instruction]]:
    return list(module.inside(row)) if row.opcode == "fusion" else ()


def _flops(computation: Computation, row: Instruction) -> float:
    if row.opcode == "custom-call":
        return _estimated(row, "flops")
    if row.opcode not in ("convolution", "dot", "ragged-dot"):
        return 0.0
    left, right = (computation.by_name[name].shapes[0].dims for name in row.operands[:2])
    out = row.shapes[0].dims
    if row.opcode == "dot":
        axes = row.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(out) * math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    if row.opcode == "ragged-dot":
        axes = row.attribute(r"lhs_contracting_dims=\{(\d+)") or str(len(left) - 1)
        return 2.0 * math.prod(out) * left[int(axes)]
    return _convolution(row, left, right, out)


def _convolution(
    row: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """A TPU's compiler writes matrix products as convolutions, most taps of which fall on padding."""
    labels = row.attribute(r"dim_labels=(\S+?)(?:,|$)") or "bf_io->bf"
    lhs, rhs, _ = re.split(r"_|->", labels)
    window = row.attribute(r"window=\{([^}]*)\}") or ""
    setting = dict(part.split("=") for part in window.split())
    total = 2.0 * left[lhs.index("b")] * right[rhs.index("i")] * right[rhs.index("o")]
    total /= int(row.attribute(r"batch_group_count=(\d+)") or 1)
    spatial = [digit for digit in lhs if digit.isdigit()]

    def per_axis(name: str, missing: str) -> list[str]:
        return setting[name].split("x") if name in setting else [missing] * len(spatial)

    pads, strides = per_axis("pad", "0_0"), per_axis("stride", "1")
    inner, outer = per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1")
    for axis, digit in enumerate(spatial):
        size, taps = left[lhs.index(digit)], right[rhs.index(digit)]
        low, high = map(int, pads[axis].split("_"))
        stride, spread, gap = int(strides[axis]), int(inner[axis]), int(outer[axis])
        padded = (size - 1) * spread + 1
        places = (padded + low + high - ((taps - 1) * gap + 1)) // stride + 1
        total *= sum(
            0 <= (at := place * stride + tap * gap - low) < padded and at % spread == 0
            for place in range(places)
            for tap in range(taps)
        )
    return total


def _estimated(row: Instruction, name: str) -> float:
    """A number of the cost estimate that a Pallas kernel carries."""
    return float(row.attribute(rf'"cost_estimate":{{[^}}]*"{name}":"(\d+)"') or 0)


def traffic(module: Module) -> float:
    """Bytes that one device reads from and writes to its HBM.

    Every operand and result that lies there counts each time; of what is only sliced or updated, the
    slice. A kernel counts as what its author estimates.
    """
    return sum(
        times * _moved(module, computation, row)
        for computation, times in runs(module)
        for row in computation.instructions
        if row.opcode not in _NOTHING_MOVES and not row.opcode.endswith(("-done", "-update"))
    )


def _moved(module: Module, computation: Computation, row: Instruction) -> float:
    if row.opcode == "custom-call":
        return _estimated(row, "bytes_accessed")
    given = [computation.by_name.get(name) for name in row.operands]
    read = [_in_hbm(one) if one else 0 for one in given]
    written = _in_hbm(row)
    if row.opcode in _SLICES:
        return 2 * written if read and read[0] else written
    if row.opcode == "dynamic-update-slice":
        return 2 * read[1] if len(read) > 1 else 0
    if row.opcode in ("copy-start", "async-start") or row.opcode.removesuffix("-start") in KINDS:
        # The result names what was given once more, and a counter.
        moved = row.shapes[0 if row.opcode == "copy-start" or row.opcode in KINDS else 1]
        return moved.nbytes * (any(read) + (moved.space == 0))
    if row.opcode != "fusion":
        return sum(read) + written
    return _fusion(module, row, read)


def _fusion(module: Module, row: Instruction, read: list[int]) -> float:
    body = module.computations[row.called[0]]
    pairs = row.attribute(r"output_to_operand_aliasing=\{(.*?\))\}") or ""
    aliased = re.findall(r"\{(\d*)\}: \((\d+),", pairs)
    kept = {int(operand) for _, operand in aliased}
    same = {int(output or 0) for output, _ in aliased}
    total = 0.0
    for place, size in enumerate(read):
        if size and place not in kept and place in body.parameters:
            total += min(size, _used(module, body, body.parameters[place]))
    results = body.root.operands if body.root.opcode == "tuple" else (body.root.name,)
    for place, (name, shape) in enumerate(zip(results, row.shapes, strict=False)):
        if shape.space == 0 and place not in same:
            total += min(shape.nbytes, _made(module, body, body.by_name[name]))
    if kept:
        for inner, found in module.inside(row):
            if found.opcode in KINDS and FIRST_STEP in found.attributes:
                total += sum(s.nbytes for s in (*inner.operand_shapes(found), *found.shapes))
    return total


def _used(module: Module, body: Computation, given: Instruction) -> float:
    """Bytes of a fusion's argument that are read."""
    total = 0.0
    for user in body.instructions:
        if given.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _used(module, body, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.called[0]]
            places = (place for place, name in enumerate(user.operands) if name == given.name)
            total += sum(_used(module, inner, inner.parameters[place]) for place in places)
        elif user.opcode in _SLICES and user.operands[0] == given.name:
            total += sum(shape.nbytes for shape in user.shapes)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != given.name:
            return float("inf")
    return total


def _made(module: Module, body: Computation, result: Instruction) -> float:
    """Bytes of a fusion's result that are written."""
    while result.opcode == "bitcast":
        result = body.by_name[result.operands[0]]
    if result.opcode == "fusion":
        inner = module.computations[result.called[0]]
        return _made(module, inner, inner.root)
    if result.opcode == "dynamic-update-slice":
        return sum(shape.nbytes for shape in body.by_name[result.operands[1]].shapes)
    return float("inf")


def _in_hbm(row: Instruction) -> int:
    return sum(shape.nbytes for shape in row.shapes if shape.space == 0)
