"""Splash's best block sizes, so that it is compared at its best: `bench splash-blocks` finds them."""

import itertools
from collections.abc import Sequence
from typing import Any

from sinkjax_kernels.cases import Case

Sizes = tuple[int, int]
KERNELS = ("fwd", "dq", "dkv")
SWEPT: tuple[int, ...] = (256, 512, 1024)
LENGTH = 8192  # at which the sweep compiles; longer cases follow from the closed form

_MIDDLE, _TALL, _LARGE = (512, 512), (1024, 512), (1024, 1024)
_SWEPT = {
    ("v5e", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v5e", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v5e", "sink-window-8k"): (_MIDDLE, _MIDDLE, _TALL),
    ("v5e", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5e", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5e", "window-1024-8k"): (_MIDDLE, _MIDDLE, _MIDDLE),
    ("v5p", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v5p", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v5p", "sink-window-8k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "window-1024-8k"): (_MIDDLE, _MIDDLE, _MIDDLE),
    ("v6e", "window-1024-8k"): (_LARGE, _MIDDLE, _MIDDLE),
    ("v6e", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v6e", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v6e", "sink-window-8k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v6e", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v6e", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
}
# Of 512 and 1024 alone, and without 512 × 1024, which is best of no case that was swept.
_SWEPT_IN_PART = {
    ("v5p", "sink-window-4096-8k"): (_LARGE, _LARGE, _LARGE),
    ("v5e", "sink-window-128-8k"): (_MIDDLE, _MIDDLE, _TALL),
    ("v5e", "sink-window-4096-8k"): (_LARGE, _TALL, _LARGE),
    ("v5e", "gpt-oss-8k"): (_MIDDLE, _MIDDLE, _MIDDLE),
}
# Not swept: as on the chips that were.
_ASSUMED = {
    (chip, name): sizes
    for chip in ("v5p", "v6e", "tpu7x")
    for name, sizes in {
        "causal-8k": (_LARGE, _LARGE, _LARGE),
        "causal-16k": (_LARGE, _LARGE, _LARGE),
        "sink-window-8k": (_MIDDLE, _MIDDLE, _LARGE),
        "sink-window-32k": (_MIDDLE, _MIDDLE, _LARGE),
        "sink-window-131k": (_MIDDLE, _MIDDLE, _LARGE),
        "sink-window-128-8k": (_MIDDLE, _MIDDLE, _TALL),
        "sink-window-4096-8k": (_LARGE, _TALL, _LARGE),
    }.items()
}
BLOCKS: dict[tuple[str, str], tuple[Sizes, Sizes, Sizes]] = _ASSUMED | _SWEPT_IN_PART | _SWEPT
"""Queries × keys of a block of forward, dq and dkv, by chip and case; 512 × 512 for the others.

Least cycles with libtpu 0.0.42.1: `python -m sinkjax_kernels.bench splash-blocks`.
"""


def sizes_for(chip: str, case: Case) -> dict[str, Sizes]:
    """Queries and keys of a block of each kernel."""
    return dict(zip(KERNELS, BLOCKS.get((chip, case.name), (_MIDDLE,) * 3), strict=True))


def search(
    cases: Sequence[Case], chips: Sequence[str], processes: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The fewest cycles of each kernel over all sizes, and what did not compile.

    Masks that differ in their length alone are compiled once.
    """
    from sinkjax_kernels.bench import pool, splash
    from sinkjax_kernels.bench.worker import Job

    def jobs(case: Case) -> dict[Sizes, Job]:
        shape = {k: v for k, v in vars(case).items() if k not in ("name", "length")}
        same = next(
            c
            for c in cases
            if {k: v for k, v in vars(c).items() if k not in ("name", "length")} == shape
        )
        return {
            (queries, keys): Job(same.name, LENGTH, "splash", dict.fromkeys(KERNELS, (queries, keys)))
            for queries in SWEPT for keys in SWEPT
        }  # fmt: skip

    wanted = list({pool.key(j): j for case in cases for j in jobs(case).values()}.values())
    built = pool.compile_all(dict.fromkeys(chips, wanted), processes)
    rows, errors = [], []
    for case, chip in itertools.product(cases, chips):
        cycles: dict[str, dict[Sizes, float]] = {k: {} for k in KERNELS}
        for sizes, job in jobs(case).items():
            result = built[chip, pool.key(job)]
            if isinstance(result, str):
                errors.append(f"{case.name} on {chip}, {sizes}: {result}")
                continue
            for name in KERNELS:
                kernel = next(k for k in result.kernels if f"mha_{name}" in k.name)
                assert kernel.splash is not None
                grid = splash.grid(case.ranges, case.length, sizes, name)
                cycles[name][sizes] = splash.Parts(**kernel.splash).cycles(grid)
        for name, found in cycles.items():
            if found:
                best = min(found, key=lambda sizes: found[sizes])
                rows.append(
                    {"case": case.name, "chip": chip, "kernel": name, "sizes": best,
                     "cycles": found[best], "cycles_512": found.get((512, 512))}
                )  # fmt: skip
    return rows, errors


def as_source(rows: Sequence[dict[str, Any]]) -> str:
    """Lines of `BLOCKS`."""
    found: dict[tuple[str, str], list[Sizes]] = {}
    for row in rows:
        found.setdefault((row["chip"], row["case"]), []).append(tuple(row["sizes"]))
    return "\n".join(f'    ("{chip}", "{case}"): {tuple(x)},' for (chip, case), x in found.items())
