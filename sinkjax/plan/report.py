"""From what the compiler left to the answer: does it fit, what does it send, how fast can it be."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from sinkjax.models.flops import decode_flops, training_flops
from sinkjax.plan.buffers import Buffer, laid_out_bytes, largest, refused_bytes
from sinkjax.plan.collectives import collectives, totals
from sinkjax.plan.compile import Compiled, compile_step
from sinkjax.plan.floors import floors
from sinkjax.plan.hlo import parse
from sinkjax.plan.job import Job
from sinkjax.plan.loops import conditionals, unknown_loops
from sinkjax.plan.topology import Topology
from sinkjax.plan.work import flops, traffic

KEYS = (
    "fits",
    "bytes_per_chip",
    "hbm_bytes",
    "collectives",
    "flops_per_step",
    "floors",
    "mfu_estimate",
    "compile_seconds",
    "chips",
)
"""What `Plan.numbers` holds."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known about a step before a chip has run it.

    Args:
      job: what was planned.
      mesh: sizes of its axes.
      fits: one chip holds its part.
      bytes_per_chip: by kind, and in all as `total`. `parameters`, `optimiser`, `cache` and `batch` are
        parts of `arguments`; `aliased` lies in arguments that are donated and is counted once.
      hbm_bytes: of a chip.
      collectives: by kind, see `collectives.totals`; of one device.
      flops_per_step: of all chips: `arithmetic` (the mathematics), `recomputed` (beside it) and
        `program` (counted in what the compiler made).
      floors: seconds, see `floors.Floors`; `step` is an estimate.
      mfu_estimate: arithmetic over peak in a step as long as that estimate; None where it does not fit.
      compile_seconds: wall clock of the compiler.
      chips: of the slice.
      devices: as JAX counts them.
      buffers: the largest.
      notes: what else one should know.
    """

    job: Job
    mesh: dict[str, int]
    fits: bool
    bytes_per_chip: dict[str, int]
    hbm_bytes: int
    collectives: dict[str, dict[str, float]]
    flops_per_step: dict[str, float]
    floors: dict[str, float]
    mfu_estimate: float | None
    compile_seconds: float
    chips: int
    devices: int
    buffers: list[Buffer]
    notes: list[str]

    @property
    def numbers(self) -> dict[str, Any]:
        """The answer as data, with `KEYS` for keys."""
        return {key: getattr(self, key) for key in KEYS}


def plan(
    job: Job, *, quick: bool = False, progress: Callable[[str], None] = lambda stage: None
) -> Plan:
    """Compile the step of a job for chips that are not there, and read what came out.

    Args:
      job: what and for which chips.
      quick: stop before machine code: the same collectives, operations and floors in less than half
        of the time, and temporaries that may be a third too low.
      progress: told again and again what is being done.

    Raises:
      ImportError: there is no libtpu; names the extra to install.
      ValueError: mesh, batch, model and slice do not fit one another.
      RuntimeError: the compiler failed.

    Example:
      >>> plan(Job("v5e:2x2", RunConfig())).fits  # doctest: +SKIP
      True
    """
    return report(job, compile_step(job, quick=quick, progress=progress))


def report(job: Job, compiled: Compiled) -> Plan:
    """The answer, from what the compiler left."""
    topology = Topology(job.topology)
    chip = topology.chip
    numbers = compiled.numbers or {}
    sizes = _bytes(compiled, chip.devices_per_chip)
    hbm = chip.hbm_bytes
    fits = not compiled.refusal and sizes["total"] <= hbm
    work = arithmetic(job)
    exchange, limits, mfu, notes = {}, {}, None, []
    if compiled.hlo:
        module = parse(compiled.hlo)
        sent = collectives(module)
        exchange = totals(sent)
        each = flops(module)
        used = math.prod(compiled.step["mesh"].values())
        work["program"] = each * used
        if used < topology.devices:
            notes.append(
                f"{topology.devices - used} devices of the slice are in no mesh; MFU has them"
            )
        found = floors(each, traffic(module), sent, chip)
        limits = dataclasses.asdict(found) | {"step": found.step}
        if fits and found.step:
            mfu = work["arithmetic"] / (found.step * chip.peak_flops * topology.chips)
        if loops := unknown_loops(module):
            notes.append(f"{loops} loops of unknown length count as one round")
        if forks := conditionals(module):
            notes.append(f"branches of {forks} conditionals count as taken equally often")
    if compiled.numbers is None and fits:
        notes.append("quick: without machine code, whose temporaries may take a third more")
    notes += _copies(compiled)
    return Plan(
        job,
        compiled.step["mesh"],
        fits,
        sizes,
        hbm,
        exchange,
        work,
        limits,
        mfu,
        numbers.get("compile_seconds", compiled.seconds),
        topology.chips,
        topology.devices,
        largest(compiled.usage, compiled.refusal),
        notes,
    )


def arithmetic(job: Job) -> dict[str, float]:
    """Operations that a step asks for, without a program: of all chips."""
    model = job.run.model
    if job.ring is not None:
        slots = job.ring.num_sink_tokens + job.ring.window
        return {"arithmetic": decode_flops(model, slots) * job.rows, "recomputed": 0.0}
    found, tokens = training_flops(model), job.rows * model.context_length
    return {"arithmetic": found.model * tokens, "recomputed": found.recomputed * tokens}


def _copies(compiled: Compiled) -> list[str]:
    """Where a decode step does not update its cache in place."""
    cache = compiled.step["held"].get("cache")
    if cache is None or compiled.numbers is None:
        return []
    memory, notes = compiled.numbers["memory"], []
    if memory["aliased"] < cache:
        notes.append(
            f"only {memory['aliased']:,} of the cache's {cache:,} bytes are updated in place"
        )
    if memory["temporaries"] > cache:
        notes.append("the temporaries are larger than the cache: something copies it, or is large")
    return notes


def _bytes(compiled: Compiled, devices: int) -> dict[str, int]:
    """By kind, of a chip with so many devices."""
    held = compiled.step["held"]
    if compiled.numbers is None:
        memory = {"arguments": sum(held.values())}
        if compiled.refusal:
            temporaries = refused_bytes(compiled.refusal)
        elif (temporaries := laid_out_bytes(compiled.usage)) is not None:
            temporaries = max(0, temporaries - memory["arguments"])
        memory |= {} if temporaries is None else {"temporaries": temporaries}
        total = sum(memory.values())
    else:
        memory = compiled.numbers["memory"]
        total = sum(memory.values()) - 2 * memory["aliased"]
    sizes = {**held, **memory, "total": total}
    return {name: size * devices for name, size in sizes.items()}
