"""The block sizes of our TPU kernels with the fewest static cycles: `bench blocks` finds them.

From the shipped ones, one size at a time is changed while that helps, for forward and backward at once: they
are kernels of their own in one program, so that a compile tells about a size of each. What is made small is
the mean over the cases of the cycles, at least what the matrix units need, over those of the shipped sizes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sinkjax_kernels import cases as cases_module
from sinkjax_kernels.bench import chips as chips_module
from sinkjax_kernels.bench import pool, schedule
from sinkjax_kernels.bench.descent import Scores, Settings, descend
from sinkjax_kernels.bench.llo import ScheduleError
from sinkjax_kernels.bench.worker import Built, Job
from sinkjax_kernels.cases import Case
from sinkjax_kernels.flash.tpu_blocks import BLOCKS, Blocks

TURNS: tuple[dict[str, tuple[int, ...]], ...] = (
    {"query": (512, 1024, 2048), "query_backward": (256, 512, 1024, 2048)},
    {"rows": (128, 256, 512), "rows_backward": (256, 512, 1024)},
    {"keys": (128, 256, 512, 1280), "keys_backward": (128, 256, 512)},
    {"chunk": (512, 1024, 2048)},
    {"wide_matmuls": (False, True)},
)
PARTS = {
    "forward": ("query", "rows", "keys", "chunk", "wide_matmuls"),
    "backward": ("query_backward", "rows_backward", "keys_backward", "chunk", "wide_matmuls"),
}


def search(
    cases: Sequence[Case], chips: Sequence[str], processes: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The best sizes with their cycles beside the shipped ones', by chip, case and pass, and what could not
    be compiled or makes too long a program.

    Raises:
        ScheduleError: that is so of the shipped sizes.
    """
    cycles: dict[tuple[str, str], Scores] = {}  # by chip and job
    left_out: list[str] = []

    def jobs(settings: Mapping[str, Any]) -> list[Job]:
        return [Job(case.name, case.length, "sinkjax", blocks=dict(settings)) for case in cases]

    def score(trials: dict[str, list[Settings]]) -> dict[str, list[Scores]]:
        wanted = {chip: [job for x in some for job in jobs(x)] for chip, some in trials.items()}
        built = pool.compile_all(wanted, processes)
        for chip, job in ((chip, job) for chip, some in wanted.items() for job in some):
            found, reason = _cycles(chip, job, built[chip, pool.key(job)])
            cycles[chip, pool.key(job)] = found
            if reason and job.blocks == vars(BLOCKS[chip]):
                raise ScheduleError(f"{job.case} on {chip}, shipped blocks: {reason}")
            if reason:
                left_out.append(f"{job.case} on {chip}, {as_call(job.blocks or {})}: {reason}")
        return {chip: [relative(chip, x) for x in some] for chip, some in trials.items()}

    def relative(chip: str, settings: Settings) -> Scores:
        pairs = [
            (cycles[chip, pool.key(mine)], cycles[chip, pool.key(shipped)])
            for mine, shipped in zip(jobs(settings), jobs(vars(BLOCKS[chip])), strict=True)
        ]
        if not all(mine for mine, _ in pairs):
            return {}
        return {part: statistics.fmean(x[part] / y[part] for x, y in pairs) for part in PARTS}

    found = descend({chip: dict(vars(BLOCKS[chip])) for chip in chips}, TURNS, PARTS, score)
    score({chip: [blocks] for chip, blocks in found.items()})  # both passes' sizes together
    rows = []
    for chip, blocks in found.items():
        for case, mine, shipped in zip(cases, jobs(blocks), jobs(vars(BLOCKS[chip])), strict=True):
            for part, now in cycles[chip, pool.key(mine)].items():
                before = cycles[chip, pool.key(shipped)][part]
                rows.append(
                    {"case": case.name, "chip": chip, "pass": part, "blocks": blocks, "cycles": now,
                     "cycles_shipped": before}
                )  # fmt: skip
    return rows, left_out


def _cycles(chip: str, job: Job, built: Built | str) -> tuple[Scores, str]:
    """Of each pass, infinite where its program is too long; nothing where it did not compile, and why."""
    if isinstance(built, str):
        return {}, built
    try:
        rows = schedule.our_rows(cases_module.case(job.case), chips_module.tpu(chip), built, job)
    except ScheduleError as error:
        return {}, str(error)
    long = [r for r in rows if r.program > schedule.LONGEST_PROGRAM]
    return (
        {r.which: math.inf if r in long else r.limit for r in rows},
        ", ".join(f"{r.which} has {r.program:,} bundles" for r in long),
    )


def as_call(blocks: Mapping[str, Any]) -> str:
    """`Blocks(..)` with what is not the default."""
    usual = vars(Blocks())
    changes = (f"{name}={value}" for name, value in blocks.items() if value != usual[name])
    return f"Blocks({', '.join(changes)})"


def as_source(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of `BLOCKS`."""
    found = {row["chip"]: as_call(row["blocks"]) for row in rows}
    return "\n".join(f'    "{chip}": {call},' for chip, call in found.items())
