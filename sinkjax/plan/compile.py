"""The TPU's compiler in a process of its own, on a machine without a TPU.

Of its own because the flags of XLA and libtpu are read once, the platform too, and because nothing
but the end of the process stops a compiler.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sinkjax.plan.job import Job
from sinkjax.strict_json import to_json

_POLL = 0.2  # seconds
_WRITTEN = 2.0  # seconds after which a text that nobody adds to is whole
_USAGE = "after_optimizations-memory-usage-report"
_ELSEWHERE = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_DISABLE_MOST_OPTIMIZATIONS")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler left.

    Args:
      step: mesh and bytes of the arguments by kind, of one device.
      numbers: of `child.compile_job`; None where the program does not fit, or was only laid out.
      hlo: the optimised program as text, empty where the compiler did not get that far.
      usage: its report on the largest buffers, likewise.
      refusal: its words where the program does not fit.
      seconds: wall clock of the process, start and tracing included.
    """

    step: dict[str, Any]
    numbers: dict[str, Any] | None
    hlo: str
    usage: str
    refusal: str
    seconds: float


def compile_step(
    job: Job, *, quick: bool = False, progress: Callable[[str], None] = lambda stage: None
) -> Compiled:
    """Compile the step of a job.

    Args:
      job: what and for which chips.
      quick: stop once the program is optimised and its buffers laid out, without machine code.
      progress: told again and again what is being done.

    Raises:
      ImportError: there is no libtpu.
      ValueError: mesh, batch, model and slice do not fit one another.
      RuntimeError: the compiler failed otherwise; holds the end of what it said.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "the planner needs the compiler of the TPU, no TPU: pip install 'sinkjax[tpu]'"
        )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sinkjax-plan-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(to_json(job), encoding="utf-8")
        with open(folder / "log", "wb") as log, _process(folder, log) as process:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
                    break
                laid_out = _laid_out(folder)
                if laid_out and quick:
                    break
                progress("assembling" if laid_out else "compiling")
        return _collect(folder, process.returncode, time.perf_counter() - started, quick)


def environment(folder: Path) -> dict[str, str]:
    """Variables of the compiling process: ours, but for what would lead it elsewhere."""
    ours = {
        name: value
        for name, value in os.environ.items()
        # A program from the cache is not compiled, and leaves no text.
        if not name.startswith(_ELSEWHERE)
    }
    return ours | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": f"--xla_dump_to={folder / 'xla'} --xla_dump_hlo_as_text",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


@contextlib.contextmanager
def _process(folder: Path, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The compiling process, and its end if this one is interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sinkjax.plan.child", str(folder)],
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        # Ctrl-C in a terminal goes to the whole group; this one is ended here, once.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _collect(folder: Path, status: int, seconds: float, quick: bool = False) -> Compiled:
    numbers, refusal = None, ""
    if (folder / "compiled.json").exists():
        numbers = json.loads((folder / "compiled.json").read_text(encoding="utf-8"))
    elif (folder / "refused.json").exists():
        refused = json.loads((folder / "refused.json").read_text(encoding="utf-8"))
        if refused["kind"] == "input":
            raise ValueError(refused["text"])
        refusal = refused["text"]
    elif not (quick and _text(folder, _USAGE)):
        if status == -signal.SIGKILL:
            raise RuntimeError(
                "the TPU's compiler was killed: this machine may have too little memory"
            )
        said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip()
        raise RuntimeError(f"the TPU's compiler ended with status {status}: {said[-2000:]}")
    return Compiled(
        json.loads((folder / "step.json").read_text(encoding="utf-8")),
        numbers,
        _text(folder, "after_optimizations"),
        _text(folder, _USAGE),
        refusal,
        seconds,
    )


def _laid_out(folder: Path) -> bool:
    """Whether the program is optimised and its buffers have places: the last text has been written."""
    found = list((folder / "xla").glob(f"*jit_step*.{_USAGE}.txt"))
    return any(time.time() - path.stat().st_mtime > _WRITTEN for path in found)


def _text(folder: Path, kind: str) -> str:
    """What XLA dumped of the step; it also compiles small things on the way."""
    found = sorted((folder / "xla").glob(f"*jit_step*.{kind}.txt"))
    return found[-1].read_text(encoding="utf-8") if found else ""
