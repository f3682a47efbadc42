"""How often each computation of a program runs: loops, and how many rounds they take."""

import math
import re
from collections.abc import Iterator

from sinkjax.plan.hlo import Computation, Instruction, Module


def runs(module: Module) -> Iterator[tuple[Computation, float]]:
    """Computations outside of fusions and asynchronous starts, each with how often it runs in all.

    Branches of a conditional count as taken equally often. A loop whose number of rounds is not in the text
    counts once, see `unknown_loops`.
    """
    yield from _runs(module, module.entry, 1.0)


def _runs(module: Module, name: str, times: float) -> Iterator[tuple[Computation, float]]:
    computation = module.computations[name]
    yield computation, times
    for instruction in computation.instructions:
        if instruction.opcode in ("fusion", "async-start"):
            continue
        rounds = 1.0
        if instruction.opcode == "while":
            rounds = trip_count(module, computation, instruction) or 1
        elif instruction.opcode == "conditional":
            rounds = 1 / max(1, len(instruction.called))
        for called in instruction.called:
            if called in module.computations:
                yield from _runs(module, called, times * rounds)


def unknown_loops(module: Module) -> int:
    """Loops whose number of rounds is not in the text."""
    return sum(
        trip_count(module, computation, instruction) is None
        for computation, _ in runs(module)
        for instruction in computation.instructions
        if instruction.opcode == "while"
    )


def conditionals(module: Module) -> int:
    """Places where a program chooses."""
    rows = (row for computation, _ in runs(module) for row in computation.instructions)
    return sum(row.opcode == "conditional" for row in rows)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if it does not say.

    The compiler writes it down where it knows; the TPU's does not, and then it follows from the
    counter: where it starts, what is added to it and what it is compared with.
    """
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = module.computations.get(loop.attribute(r"condition=%([\w.\-]+)") or "")
    body = module.computations.get(loop.attribute(r"body=%([\w.\-]+)") or "")
    if condition is None or body is None:
        return None
    test = _through(condition, condition.root)
    if test.opcode != "compare" or len(test.operands) != 2:
        return None
    counter, limit = (_through(condition, condition.by_name[name]) for name in test.operands)
    direction = test.attribute(r"direction=(\w+)")
    if counter.opcode == "constant":
        counter, limit = limit, counter
        direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction or "", direction)
    index = _element(counter)
    first = computation.by_name.get(loop.operands[0]) if loop.operands else None
    if index is None or first is None or first.opcode != "tuple":
        return None

    def started(place: int) -> int | None:
        return _constant(computation, computation.by_name[first.operands[place]])

    last = _element(limit)
    end = _constant(condition, limit) if last is None else started(last)
    begin, step = started(index), _step(body, index)
    if begin is None or end is None or not step:
        return None
    if direction in ("LE", "GE"):
        end += 1 if step > 0 else -1
    return max(0, math.ceil((end - begin) / step))


def _through(computation: Computation, instruction: Instruction) -> Instruction:
    """What an instruction hands on unchanged."""
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _element(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    found = instruction.attribute(r"index=(\d+)")
    return int(found) if found else None


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    instruction = _through(computation, instruction)
    found = re.match(r"-?\d+", instruction.attributes)
    return int(found.group()) if instruction.opcode == "constant" and found else None


def _step(body: Computation, index: int) -> int | None:
    """What one round adds to an element of the loop's state."""
    if body.root.opcode != "tuple":
        return None
    added = _through(body, body.by_name[body.root.operands[index]])
    if added.opcode not in ("add", "subtract") or len(added.operands) != 2:
        return None
    parts = [_through(body, body.by_name[name]) for name in added.operands]
    step = [_constant(body, part) for part in parts]
    if _element(parts[0]) == index and step[1] is not None:
        return step[1] if added.opcode == "add" else -step[1]
    if added.opcode == "add" and _element(parts[1]) == index:
        return step[0]
    return None
