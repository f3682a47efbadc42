"""Static cycles of our TPU kernels and of splash attention, side by side, without a TPU.

Cycles are bundles that the compiler's final schedule runs, per query head, waiting left out: for memory,
and for instructions of programs that are too long to stay where they are fetched from. They are those
of the Pallas calls alone; `xla_cycles` are those of the fusions that XLA puts around them, such as
D = Σ dO · O, for both implementations alike, and `temp_bytes` is of the whole program of both passes.

Both are compiled at each case's own length, with arguments that lie as their kernels want them. Above
32,768 tokens splash's mask takes minutes, so that its cycles come from the closed form of its grid.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from sinkjax_kernels import cases as cases_module
from sinkjax_kernels.bench import chips, limits, pool, splash
from sinkjax_kernels.bench.llo import ScheduleError
from sinkjax_kernels.bench.splash_blocks import sizes_for
from sinkjax_kernels.bench.worker import Built, Job, Kernel
from sinkjax_kernels.cases import Case

PASSES = {"forward": ("fwd",), "backward": ("dq", "dkv")}
LONGEST_PROGRAM = 12_000
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One pass of one implementation of a case on a chip; all but the last eight per query head.

    Args:
        bundles_per_tile: mean of the pieces with matrix work; `blocks` is how many of them run, so that
            cycles = blocks × bundles_per_tile + what the grid around them costs.
        mxu_floor: cycles that the matrix units need for the tiles that the implementation cannot skip.
        spills: vector registers spilled, in the programs' text.
        build_seconds: of the host's processor, to prepare, trace and lower both passes.
        program: bundles of the longest program.
        skipped: bundles of pieces that run or not depending on data, which are in no count.
    """

    case: str
    chip: str
    implementation: str
    bundles_per_tile: float
    blocks: float
    cycles: float
    mxu_floor: float
    spills: int | None
    temp_bytes: int | None
    build_seconds: float | None
    program: int
    skipped: int
    xla_cycles: float | None
    kernels: tuple[str, ...]
    which: str

    @property
    def limit(self) -> float:
        """Cycles, or where a schedule promises more than the matrix units do, what they need."""
        return max(self.cycles, self.mxu_floor)

    def as_json(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        which = row.pop("which")
        front = {"case": row.pop("case"), "chip": row.pop("chip"), "pass": which}
        return front | row | {"jax": _version("jax"), "libtpu": _version("libtpu")}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def jobs_for(case: Case, chip: str) -> tuple[Job, Job]:
    """Ours, and splash's at a length whose mask can be prepared."""
    length = min(case.length, splash.LONGEST)
    return (
        Job(case.name, case.length, "sinkjax"),
        Job(case.name, length, "splash", sizes_for(chip, case)),
    )


def measure(
    cases: Sequence[Case], names: Sequence[str], processes: int, done: Callable | None = None
) -> tuple[list[Row], list[str]]:
    """Rows of all cases on all chips, and what went wrong with those that are missing."""
    jobs: dict[str, dict[str, Job]] = {
        chip: {pool.key(job): job for case in cases for job in jobs_for(case, chip)}
        for chip in names
    }
    built = pool.compile_all({chip: list(x.values()) for chip, x in jobs.items()}, processes, done)
    rows, errors = [], []
    for chip in names:
        for case in cases:
            for job in jobs_for(case, chip):
                result = built[chip, pool.key(job)]
                try:
                    if isinstance(result, str):
                        raise ScheduleError(result)
                    rows += (our_rows if job.implementation == "sinkjax" else splash_rows)(
                        case, chips.tpu(chip), result, job
                    )
                except ScheduleError as error:
                    errors.append(f"{case.name} on {chip}, {job.implementation}: {error}")
    return rows, errors


def our_rows(case: Case, chip: chips.Tpu, built: Built, job: Job) -> list[Row]:
    """Both passes of ours.

    Raises:
        ScheduleError: a pass has no kernel, or one with less matrix work than its tiles need.
    """
    rows = []
    for which in PASSES:
        kernels = [k for k in built.kernels if ("backward" in k.name) == (which == "backward")]
        if not kernels:
            raise ScheduleError(f"no {which} kernel among {[k.name for k in built.kernels]}")
        tiles = [tile for k in kernels for tile in k.tiles]
        runs = sum(n for _, n, _ in tiles)
        pairs = limits.visible_pairs(case)
        _check_work(
            case, chip, limits.OURS[which] * pairs, sum(n * m for _, n, m in tiles) / case.num_heads
        )
        rows.append(
            Row(
                case=case.name, chip=chip.name, which=which, implementation="sinkjax",
                bundles_per_tile=round(sum(b * n for b, n, _ in tiles) / runs, 1),
                blocks=runs / case.num_heads,
                cycles=sum(k.cycles for k in kernels) / case.num_heads,
                mxu_floor=limits.cycles(chip, pairs, case.head_dim, which),
                kernels=tuple(k.name for k in kernels),
                build_seconds=built.build_seconds, **_common(kernels, built, case),
            )
        )  # fmt: skip
    return rows


def splash_rows(case: Case, chip: chips.Tpu, built: Built, job: Job) -> list[Row]:
    """Both passes of splash, from the parts of its kernels and the grid of the case's own length.

    Raises:
        ScheduleError: the parts do not explain what a kernel did at the length it was compiled for.
    """
    is_own = job.length == case.length
    rows = []
    for which, names in PASSES.items():
        kernels = {n: next(k for k in built.kernels if f"mha_{n}" in k.name) for n in names}
        tiles = blocks = cycles = floor = 0.0
        for name, kernel in kernels.items():
            assert job.sizes is not None and kernel.splash is not None
            sizes = job.sizes[name]
            parts = splash.Parts(**kernel.splash)
            here = splash.grid(case.ranges, job.length, sizes, name)
            _check_parts(kernel, parts, here, case.num_heads)
            grid = splash.grid(case.ranges, case.length, sizes, name)
            pairs = grid.blocks * sizes[0] * sizes[1]
            matrix = sum(m for _, _, m in kernel.skipped) * grid.blocks
            _check_work(case, chip, limits.SPLASH[name] * pairs, matrix)
            tiles += parts.tile * grid.blocks
            blocks += grid.blocks
            cycles += parts.cycles(grid)
            floor += limits.cycles(chip, pairs, case.head_dim, name)
        common = _common(list(kernels.values()), built, case)
        if not is_own:
            common |= {"temp_bytes": None, "xla_cycles": None}
        rows.append(
            Row(
                case=case.name, chip=chip.name, which=which, implementation="splash",
                bundles_per_tile=round(tiles / blocks, 1), blocks=blocks, cycles=cycles,
                mxu_floor=floor, build_seconds=built.build_seconds if is_own else None,
                kernels=tuple(f"{n} {'x'.join(map(str, (job.sizes or {})[n]))}" for n in names),
                **common | {"skipped": 0},
            )
        )  # fmt: skip
    return rows


def _common(kernels: list[Kernel], built: Built, case: Case) -> dict[str, Any]:
    return {
        "spills": sum(k.spills for k in kernels),
        "temp_bytes": built.temp_bytes,
        "program": max(k.bundles for k in kernels),
        "skipped": sum(b for k in kernels for b, _, _ in k.skipped),
        "xla_cycles": sum(k.cycles for k in built.fusions) / case.num_heads,
    }


def _check_work(case: Case, chip: chips.Tpu, matmul_pairs: float, instructions: float) -> None:
    """All that has to be multiplied is: the walk has missed no body."""
    need = 2 * matmul_pairs * case.head_dim
    can = limits.capacity(chip, 1) * instructions
    if can < need:
        raise ScheduleError(
            f"the matrix instructions that were counted do {can:.3g} FLOPs per head, the tiles need "
            f"{need:.3g}"
        )


def _check_parts(kernel: Kernel, parts: splash.Parts, grid: splash.Grid, heads: int) -> None:
    walked = kernel.cycles / heads + grid.blocks * parts.tile
    if abs(parts.cycles(grid) - walked) > 0.01 * walked:
        raise ScheduleError(
            f"{kernel.name}: its parts give {parts.cycles(grid):.0f} cycles, its schedule {walked:.0f}"
        )


_CHIPS = ("v5e", "v5p", "v6e")
_EQUAL = (1.0, 1.0, 1.0)
_WINDOW = (0.55, 0.52, 0.38)
TARGETS: dict[tuple[str, str], tuple[float, float, float]] = {
    ("sink-window-8k", "forward"): _WINDOW,
    ("sink-window-32k", "forward"): _WINDOW,
    ("sink-window-8k", "backward"): (0.45, 0.42, 0.30),
    ("sink-window-32k", "backward"): (0.34, 0.27, 0.23),
    ("sink-window-131k", "backward"): (0.25, 0.25, 0.25),
    ("causal-8k", "forward"): (0.80, 0.76, 0.66),
    ("causal-8k", "backward"): (0.70, 0.66, 0.52),
} | {
    (name, which): _EQUAL
    for name in ("window-1024-8k", "sink-window-128-8k", "sink-window-4096-8k", "gpt-oss-8k")
    for which in PASSES
}
"""At most so many of splash's cycles, on v5e, v5p and v6e."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A bound, and whether it holds."""

    what: str
    value: float
    most: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.most is None:
            return ""
        return "ok" if self.value <= self.most else "missed"


def ratios(rows: Sequence[Row]) -> list[Check]:
    """Ours to splash, of each case, chip and pass that has both."""
    known = {(r.case, r.chip, r.which, r.implementation): r for r in rows}
    found = []
    for (case, chip, which, implementation), ours in known.items():
        theirs = known.get((case, chip, which, "splash"))
        if implementation != "sinkjax" or theirs is None:
            continue
        targets = TARGETS.get((case, which)) if chip in _CHIPS else None
        limited = [r.implementation for r in (ours, theirs) if r.limit > r.cycles]
        found.append(
            Check(
                f"{case} {chip} {which}",
                ours.limit / theirs.limit,
                targets[_CHIPS.index(chip)] if targets else None,
                f"matrix units limit {' and '.join(limited)}" if limited else "",
            )
        )
    return found


def bounds(rows: Sequence[Row]) -> list[Check]:
    """What must hold of our programs besides their cycles."""
    ours = [r for r in rows if r.implementation == "sinkjax"]
    found = [
        Check(f"{r.case} {r.chip} {r.which}: bundles of the program", r.program, LONGEST_PROGRAM)
        for r in ours
    ]
    for r in ours:
        if r.which != "backward":
            continue  # both passes are one call
        if r.build_seconds is not None and cases_module.case(r.case).length >= 100_000:
            found.append(Check(f"{r.case} {r.chip}: seconds to build", r.build_seconds, 1.0))
        if r.case == "sink-window-32k" and r.chip == "v5e" and r.temp_bytes is not None:
            found.append(Check(f"{r.case} {r.chip}: MiB of HBM temp", r.temp_bytes / MIB, 256))
    return found
