"""Compiles calls for one TPU chip without having one, and counts their schedules: one process per chip.

The compiler reads its flags once per process, and they name the folder of the dump. Jobs come as JSON,
one per line of standard input; results go the same way to standard output, in the same order.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from sinkjax_kernels import cases, masks, normalizers
from sinkjax_kernels.bench import chips, llo
from sinkjax_kernels.bench.walk import walk


@dataclasses.dataclass(frozen=True)
class Job:
    """One call to compile.

    Args:
        case: name of a case.
        length: of the sequence, which may be another than the case's.
        implementation: "sinkjax" or "splash".
        sizes: splash's blocks of each kernel.
        heads: query and key heads, instead of the case's own.
        blocks: fields of our `Blocks`, instead of the chip's own.
    """

    case: str
    length: int
    implementation: str
    sizes: Mapping[str, tuple[int, int]] | None = None
    heads: tuple[int, int] | None = None
    blocks: Mapping[str, Any] | None = None

    @property
    def the_case(self) -> cases.Case:
        case = dataclasses.replace(cases.case(self.case), length=self.length)
        if self.heads is None:
            return case
        return dataclasses.replace(case, num_heads=self.heads[0], num_kv_heads=self.heads[1])


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of one Pallas call, or of one XLA fusion.

    Args:
        name: of the kernel in the dump.
        bundles: length of its program.
        cycles: of the whole call, all heads, parts that depend on data left out.
        spills: vector registers spilled, in the program's text.
        tiles: (bundles, runs, matrix instructions) of the straight pieces with matrix work.
        skipped: the same of pieces that depend on data, `runs` being how often they were come by.
        steps: bundles of the turns of the grid: (bundles, turns), in no order.
        splash: the parts of a splash kernel.
    """

    name: str
    bundles: int
    cycles: int
    spills: int
    tiles: list[tuple[int, int, int]]
    skipped: list[tuple[int, int, int]]
    steps: list[tuple[int, int]]
    splash: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled call.

    Args:
        build_seconds: of the host's processor, to prepare, trace and lower it.
        compile_seconds: of the compiler.
        temp_bytes: memory of the whole forward and backward program that is no argument and no result.
        kernels: its Pallas calls.
        fusions: what XLA runs around them.
    """

    build_seconds: float
    compile_seconds: float = 0.0
    temp_bytes: int | None = None
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    fusions: list[Kernel] = dataclasses.field(default_factory=list)


def environment(folder: str) -> dict[str, str]:
    """Variables of a process that dumps its schedules into a folder."""
    return os.environ | {
        "LIBTPU_INIT_ARGS": llo.DUMP_FLAGS.format(folder=folder),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache has no schedule
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
    }


def main(arguments: list[str]) -> int:
    """`python -m sinkjax_kernels.bench.worker CHIP`, with `environment(folder)`."""
    chip = chips.tpu(arguments[0])
    folder = pathlib.Path(os.environ["LIBTPU_INIT_ARGS"].split("=", 1)[1].split()[0])
    build = Builder(chip, folder)
    for line in sys.stdin:
        try:
            result: dict[str, Any] = dataclasses.asdict(build(Job(**json.loads(line))))
        except Exception as error:  # it is the answer to this job; the next may go well
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
    return 0


class Builder:
    """Compiles jobs for a chip; its schedules appear in `folder` and are deleted when read."""

    def __init__(self, chip: chips.Tpu, folder: pathlib.Path):
        import jax
        from jax.experimental import topologies

        self.chip, self.folder = chip, folder
        device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[
            0
        ]
        place = jax.sharding.SingleDeviceSharding(device)
        self.shape = lambda sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
        self.is_warm = False

    def __call__(self, job: Job) -> Built:
        if not self.is_warm:  # the first trace of a process also imports
            self.is_warm = True
            self._lower(dataclasses.replace(job, length=1024))
        lowered, seconds, grids = self._lower(job)
        for path in self.folder.iterdir():
            path.unlink()
        start = time.perf_counter()
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - start
        programs = llo.read(self.folder, self.chip.branch_delay)
        for path in self.folder.iterdir():
            path.unlink()
        kernels, fusions = [], []
        for program in programs:
            is_kernel = job.implementation in program.name
            walked = walk(program, self.chip.cores)
            found = Kernel(
                program.name,
                program.size,
                walked.cycles,
                sum(program.spills),
                [(p.bundles, p.runs, p.matmuls) for p in walked.tiles],
                [(p.bundles, p.reached, p.matmuls) for p in walked.skipped],
                sorted((x, walked.steps.count(x)) for x in set(walked.steps)),
                self._splash(walked, grids, job) if is_kernel and grids else None,
            )
            (kernels if is_kernel else fusions).append(found)
        if not kernels:
            raise llo.ScheduleError(
                f"{job.case}: no kernel named after {job.implementation} in the dump, but "
                f"{', '.join(p.name for p in programs) or 'nothing'}"
            )
        memory = compiled.memory_analysis()
        return Built(
            round(seconds, 3),
            round(compile_seconds, 2),
            None if memory is None else memory.temp_size_in_bytes,
            kernels,
            fusions,
        )

    def _splash(self, walked, grids, job):
        from sinkjax_kernels.bench import splash

        kernel = next(k for k in ("dkv", "dq", "fwd") if f"mha_{k}" in walked.program.name)
        return dataclasses.asdict(
            splash.parts(walked, grids[kernel], job.the_case.num_heads, self.chip.cores)
        )

    def _lower(self, job: Job):
        """The lowered forward and backward program, the seconds it took, and splash's grids."""
        import jax

        start = time.process_time()
        attend, operands, grids = (
            self._splash_call(job) if job.implementation == "splash" else self._our_call(job)
        )

        def both(query, key, value, sinks, d_out):
            out, back = jax.vjp(attend, query, key, value, sinks)
            return out, back(d_out)

        lowered = jax.jit(both).lower(*operands, operands[0])
        return lowered, time.process_time() - start, grids

    def _our_call(self, job: Job):
        """Arguments are `[B, N, T, H]`, as the projection before can leave them: nothing is transposed."""
        import jax.numpy as jnp

        from sinkjax_kernels.flash import pallas_tpu, tpu_blocks

        case = job.the_case
        T, K, H = case.length, case.num_kv_heads, case.head_dim
        blocks = tpu_blocks.BLOCKS[self.chip.name]
        if job.blocks is not None:
            blocks = tpu_blocks.Blocks(**job.blocks)

        def attend(query, key, value, sinks):
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
            visibility = masks.build(
                (1, T, T, K),
                is_causal=True,
                local_window_size=None if case.window is None else (case.window - 1, 0),
                num_sink_tokens=case.num_sink_tokens,
            )
            out, _ = pallas_tpu.attention(
                query, key, value, None, None, visibility, sinks if case.has_sinks else None,
                normalizer=normalizers.Softmax(), scale=H**-0.5, logits_soft_cap=None, blocks=blocks,
            )  # fmt: skip
            return out.swapaxes(1, 2)

        operands = [self.shape((1, n, T, H), jnp.bfloat16) for n in (case.num_heads, K, K)]
        return attend, (*operands, self.shape((case.num_heads,), jnp.float32)), None

    def _splash_call(self, job: Job):
        from sinkjax_kernels.bench import splash

        case = job.the_case
        sizes = {k: (queries, keys) for k, (queries, keys) in (job.sizes or {}).items()}
        attend, _ = splash.build(case, sizes)
        grids = {k: splash.grid(case.ranges, case.length, sizes[k], k) for k in splash.KERNELS}
        return attend, splash.arguments(case, self.shape), grids


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
