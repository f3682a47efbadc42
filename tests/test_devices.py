"""Runs `tests/devices` in a process of its own, where the CPU is 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.devices
def test_everything_that_needs_eight_devices() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "tests/devices",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # 5 is "no tests collected": a silent pass otherwise.
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
