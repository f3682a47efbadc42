"""Splash's best block sizes, so that it is compared at its best: `bench splash-blocks` finds them."""

import itertools
from collections.abc import Sequence
from typing import Any

from sinkjax_kernels.bench.descent import fewest
from sinkjax_kernels.cases import Case

Sizes = tuple[int, int]
KERNELS = ("fwd", "dq", "dkv")
SWEPT: tuple[int, ...] = (256, 512, 1024)
LENGTH = 8192  # at which the sweep compiles; longer cases follow from the closed form

_SMALL, _MIDDLE, _TALL, _LARGE = (256, 256), (512, 512), (1024, 512), (1024, 1024)
_SWEPT = {
    ("v5e", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v5e", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v5e", "sink-window-8k"): (_MIDDLE, _MIDDLE, _TALL),
    ("v5e", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5e", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5e", "window-1024-8k"): (_MIDDLE, _MIDDLE, _MIDDLE),
    ("v5e", "sink-window-128-8k"): (_MIDDLE, _SMALL, _TALL),
    ("v5e", "sink-window-4096-8k"): (_LARGE, _TALL, _LARGE),
    ("v5e", "gpt-oss-8k"): ((256, 512), _SMALL, _SMALL),
    ("v5p", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v5p", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v5p", "sink-window-8k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v5p", "window-1024-8k"): (_MIDDLE, _MIDDLE, _MIDDLE),
    ("v5p", "sink-window-128-8k"): (_MIDDLE, (512, 256), _TALL),
    ("v5p", "sink-window-4096-8k"): (_LARGE, _TALL, _LARGE),
    ("v5p", "gpt-oss-8k"): (_MIDDLE, _SMALL, _MIDDLE),
    ("v6e", "causal-8k"): (_LARGE, _LARGE, _LARGE),
    ("v6e", "causal-16k"): (_LARGE, _LARGE, _LARGE),
    ("v6e", "sink-window-8k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v6e", "sink-window-32k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v6e", "sink-window-131k"): (_MIDDLE, _MIDDLE, _LARGE),
    ("v6e", "window-1024-8k"): (_LARGE, _MIDDLE, _MIDDLE),
    ("v6e", "sink-window-128-8k"): ((512, 256), (512, 256), _TALL),
    ("v6e", "sink-window-4096-8k"): (_LARGE, _LARGE, _LARGE),
    ("v6e", "gpt-oss-8k"): (_MIDDLE, _SMALL, (256, 512)),
}
# Not swept: as on v6e, whose matrix units are of the same size.
_ASSUMED = {("tpu7x", name): sizes for (chip, name), sizes in _SWEPT.items() if chip == "v6e"}
BLOCKS: dict[tuple[str, str], tuple[Sizes, Sizes, Sizes]] = _ASSUMED | _SWEPT
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
    from sinkjax_kernels.bench.worker import Built, Job

    def shape(case: Case):
        return {k: v for k, v in vars(case).items() if k not in ("name", "length")}

    def jobs(case: Case) -> dict[Sizes, Job]:
        same = next(c for c in cases if shape(c) == shape(case))
        return {
            (queries, keys): Job(same.name, LENGTH, "splash", dict.fromkeys(KERNELS, (queries, keys)))
            for queries in SWEPT for keys in SWEPT
        }  # fmt: skip

    def cycles(case: Case, sizes: Sizes, built: Built) -> dict[str, float]:
        found = {}
        for name in KERNELS:
            kernel = next(k for k in built.kernels if f"mha_{name}" in k.name)
            assert kernel.splash is not None
            grid = splash.grid(case.ranges, case.length, sizes, name)
            found[name] = splash.Parts(**kernel.splash).cycles(grid)
        return found

    wanted = list({pool.key(j): j for case in cases for j in jobs(case).values()}.values())
    built = pool.compile_all(dict.fromkeys(chips, wanted), processes)
    rows, errors = [], []
    for case, chip in itertools.product(cases, chips):
        found: dict[Sizes, dict[str, float]] = {}
        for sizes, job in jobs(case).items():
            result = built[chip, pool.key(job)]
            if isinstance(result, str):
                errors.append(f"{case.name} on {chip}, {sizes}: {result}")
            else:
                found[sizes] = cycles(case, sizes, result)
        for name, best in fewest(found).items():
            rows.append(
                {"case": case.name, "chip": chip, "kernel": name, "sizes": best,
                 "cycles": found[best][name], "cycles_512": found.get(_MIDDLE, {}).get(name)}
            )  # fmt: skip
    return rows, errors


def as_source(rows: Sequence[dict[str, Any]]) -> str:
    """Lines of `BLOCKS`."""
    found: dict[tuple[str, str], list[Sizes]] = {}
    for row in rows:
        found.setdefault((row["chip"], row["case"]), []).append(tuple(row["sizes"]))
    return "\n".join(f'    ("{chip}", "{case}"): {tuple(x)},' for (chip, case), x in found.items())
