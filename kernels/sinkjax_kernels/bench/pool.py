"""Runs compile jobs in one process per chip, a few of them at a time."""

import concurrent.futures
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable

from sinkjax_kernels.bench.worker import Built, Job, Kernel, environment


class CompileError(Exception):
    """A process that compiles ended without an answer; with the end of what it said."""


def compile_all(
    jobs: dict[str, list[Job]], processes: int = 2, done: Callable[[str, Job], None] | None = None
) -> dict[tuple[str, str], Built | str]:
    """Results of jobs given by chip, each a `Built` or the reason why there is none, by chip and `key`.

    Args:
        jobs: by name of chip, in the order in which they are to run.
        processes: at the same time.
        done: told of each job's end.
    """

    def run(chip: str) -> list[Built | str]:
        results = []
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
            with subprocess.Popen(
                [sys.executable, "-m", "sinkjax_kernels.bench.worker", chip],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                env=environment(folder),
            ) as process:  # fmt: skip
                assert process.stdin is not None and process.stdout is not None
                for job in jobs[chip]:
                    try:
                        process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
                        process.stdin.flush()
                    except BrokenPipeError:
                        pass  # it has ended; reading says so
                    line = process.stdout.readline()
                    if not line:
                        process.wait()
                        said.seek(0)
                        raise CompileError(
                            f"{chip}: the compiling process ended with {process.returncode}; it needs "
                            "libtpu (`pip install 'sinkjax[tpu]'`). It said:\n"
                            + said.read()[-2000:]
                        )
                    results.append(_result(json.loads(line)))
                    if done is not None:
                        done(chip, job)
                process.stdin.close()
        return results

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    return {
        (chip, key(job)): result
        for chip, results in found.items()
        for job, result in zip(jobs[chip], results, strict=True)
    }


def key(job: Job) -> str:
    """Of a result."""
    return json.dumps(dataclasses.asdict(job))


def _result(answer: dict) -> Built | str:
    if "error" in answer:
        return answer["error"]
    for kind in ("kernels", "fusions"):
        answer[kind] = [
            Kernel(
                **x | {name: [tuple(y) for y in x[name]] for name in ("tiles", "skipped", "steps")}
            )
            for x in answer[kind]
        ]
    return Built(**answer)
