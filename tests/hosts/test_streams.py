"""Streams on a mesh of several processes: each of them draws what one device draws."""

import json
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("stream_program.py")


@pytest.fixture(scope="module")
def draw(begin, address, tmp_path_factory):
    """What each process found."""

    def run(count, devices, mesh):
        out = tmp_path_factory.mktemp("streams")
        where, mesh = address(), json.dumps(mesh)
        processes = [
            begin([PROGRAM, where, str(count), str(process), mesh, out], devices)
            for process in range(count)
        ]
        try:
            for process in processes:
                _, said = process.communicate(timeout=240)
                assert process.returncode == 0, said
        finally:
            for process in processes:
                process.kill()
        return [json.loads((out / str(n) / "found.json").read_text()) for n in range(count)]

    return run


@pytest.fixture(scope="module")
def alone(draw):
    return draw(1, 1, {})[0]


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 2, {"data": 2, "model": 2}),  # each has rows of its own
        (2, 2, {"model": 4, "explicit": True}),  # each has heads of all rows
        (4, 1, {"data": 2, "model": 2}),
    ],
)
def test_streams_of_several_processes_are_those_of_one_device(draw, alone, count, devices, mesh):
    for found in draw(count, devices, mesh):
        for events, wanted in zip(found["streams"], alone["streams"], strict=True):
            assert [token for token, _ in events] == [token for token, _ in wanted]
            logprobs = [[x for _, x in some] for some in (events, wanted)]
            np.testing.assert_allclose(*logprobs, atol=2e-4)
        np.testing.assert_allclose(found["rows"], alone["rows"], atol=2e-4)
