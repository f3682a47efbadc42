"""`python -m sinkjax.plan.child FOLDER`: compile the job in a folder, in a process of its own.

Reads `job.json`; writes `compiled.json`, or `refused.json` with the reason: `kind` is `input` for a
mistake of the caller and `memory` for a program that the chips cannot hold; and before it compiles
`step.json`, what it is about to.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sinkjax.files import write_whole
from sinkjax.plan.job import Job, read_job
from sinkjax.plan.topology import Topology


class Refused(Exception):
    """The compiler says that the program does not fit into the memory of a chip."""


def main(folder: Path) -> int:
    """Compile and write down what came out."""
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        job = read_job((folder / "job.json").read_text(encoding="utf-8"))
        found = compile_job(job, lambda step: write_whole(folder / "step.json", json.dumps(step)))
    except ValueError as error:
        write_whole(folder / "refused.json", json.dumps({"kind": "input", "text": str(error)}))
        return 2
    except Refused as error:
        write_whole(folder / "refused.json", json.dumps({"kind": "memory", "text": str(error)}))
        return 1
    write_whole(folder / "compiled.json", json.dumps(found))
    return 0


def _follow(parent: int) -> None:
    """End with the process that waits for the answer, however it ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compile_job(job: Job, tell: Callable[[dict], Any]) -> dict:
    """Bytes on one device, and seconds.

    Args:
      job: what and for which chips.
      tell: is given sizes of the mesh and bytes of the arguments before the compiler starts.

    Raises:
      ValueError: the job does not fit the slice, or the slice does not exist.
      Refused: the compiler says that the program does not fit.
    """
    import jax
    from jax.experimental import topologies

    from sinkjax.plan.steps import build

    slice_ = Topology(job.topology)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=job.topology, wrap=slice_.wrap
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology: the TPU's compiler knows no {job.topology}: {error}"
        ) from error
    started = time.perf_counter()
    step = build(job, devices)
    with jax.set_mesh(step.mesh):
        lowered = step.function.lower(*step.arguments)
    tell({"mesh": dict(step.mesh.shape), "held": step.held})
    traced = time.perf_counter()
    processor = time.process_time()
    try:
        compiled = lowered.compile(compiler_options=job.options)
    except jax.errors.JaxRuntimeError as error:
        # A kernel may ask for too much of a chip's small memories, which is not the plan's to say.
        small = re.search(r"memory space (vmem|smem)", str(error))
        if "RESOURCE_EXHAUSTED" in str(error) and not small:
            raise Refused(str(error)) from error
        if "No such compile option" in str(error):
            raise ValueError(f"compiler-options: {error}") from error
        raise
    memory = compiled.memory_analysis()
    return {
        "trace_seconds": traced - started,
        "compile_seconds": time.perf_counter() - traced,
        "compile_cpu_seconds": time.process_time() - processor,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
