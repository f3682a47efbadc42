"""Tests in this folder start the command line in several processes, on loopback.

They are off by default: `python -m pytest -m hosts -n0 tests/hosts`.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkjax.train import read_metrics

RUN = "import sys; from sinkjax.cli import main; sys.exit(main(sys.argv[1:]))"
MODEL = {
    "model-dim": 24,
    "num-layers": 1,
    "num-heads": 4,
    "num-kv-heads": 2,
    "head-dim": 10,
    "mlp-dim": 14,
    "context-length": 20,
}
STEPS = 120  # enough to be stopped among them
LIMIT = 240  # seconds, for a busy machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.hosts)


@pytest.fixture(scope="session")
def address():
    """address() -> HOST:PORT that nobody listens at."""

    def find() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"127.0.0.1:{server.getsockname()[1]}"

    return find


@dataclasses.dataclass
class Hosts:
    """The processes of one command with the same words, each with its own end of them."""

    out: Path
    processes: list[subprocess.Popen[str]]

    def reach(self, step: int) -> None:
        """Return once a step is in the log."""
        end = time.monotonic() + LIMIT
        while not any(row["step"] >= step for row in read_metrics(self.out / "metrics.jsonl")):
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended and time.monotonic() < end, [p.communicate() for p in ended]
            time.sleep(0.01)

    def end(self) -> tuple[list[int], list[str]]:
        """Exit status and standard error of each."""
        said = [process.communicate(timeout=LIMIT)[1] for process in self.processes]
        return [process.returncode for process in self.processes], said

    def well(self) -> "Hosts":
        """Wait for the end; it must be a good one."""
        status, said = self.end()
        assert status == [0] * len(status), "\n".join(said)
        return self

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()

    def values(self) -> dict[tuple[int, str], float]:
        """Loss by step and kind."""
        rows = read_metrics(self.out / "metrics.jsonl")
        return {(row["step"], row["split"]): row.get("loss", row["nll"]) for row in rows}


@pytest.fixture(scope="session")
def begin(tmp_path_factory):
    """begin(words, devices=1, environment={}) -> one process that runs Python with these words."""
    cache = tmp_path_factory.mktemp("compiled")

    def run(words, devices=1, environment=None) -> subprocess.Popen[str]:
        ours = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        return subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | ours | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def start(begin, address, text):
    """start(out, words, count=2, devices=1, own={}, cluster=None) -> Hosts."""
    started = []

    def run(out, words="", count=2, devices=1, own=None, cluster=None) -> Hosts:
        shape = " ".join(f"--model.{name} {value}" for name, value in MODEL.items())
        common = (
            f"train --out {out} {shape} --data.files {text} --data.batch-size 8 --steps {STEPS} "
            f"--log-every 1 --eval-every {STEPS // 2} --eval-batches 2 --checkpoint-every 20 {words}"
        )
        where, processes = address(), []
        for process in range(count):
            more, environment = (own or {}).get(process, ""), {}
            if cluster is not None:
                environment = cluster(process)
            elif count > 1:
                more += (
                    f" --distributed.mode explicit --distributed.coordinator {where}"
                    f" --distributed.num-processes {count} --distributed.process-id {process}"
                )
            words_of_one = ["-c", RUN, *common.split(), *more.split()]
            processes.append(begin(words_of_one, devices, environment))
        started.append(Hosts(out, processes))
        return started[-1]

    yield run
    for hosts in started:
        hosts.kill()


@pytest.fixture(scope="session")
def unbroken(start, tmp_path_factory):
    """What one process with one device makes of it."""
    found = start(tmp_path_factory.mktemp("runs") / "unbroken", count=1).well().values()
    assert len(found) == STEPS + 3 and found[STEPS, "train"] < 5
    return found
