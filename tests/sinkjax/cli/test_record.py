"""What stands beside a number."""

import json
import time
from pathlib import Path

import jax
import numpy as np

from sinkjax.cli.record import environment, peak_memory_bytes, write_json


def test_environment_names_versions_device_seconds_and_memory():
    found = environment(7, time.perf_counter() - 2.0)
    assert list(found) == ["seed", "versions", "device", "seconds", "peak_memory_bytes"]
    assert list(found["versions"]) == ["sinkjax", "jax", "jaxlib", "flax", "python"]
    assert found["seed"] == 7 and found["versions"]["jax"] == jax.__version__
    assert jax.devices()[0].device_kind in found["device"]
    assert 2.0 <= found["seconds"] < 60.0
    json.dumps(found, allow_nan=False)


def test_peak_memory_is_in_bytes_and_never_falls():
    before = peak_memory_bytes()
    assert 50e6 < before < 50e9  # jax is loaded
    block = np.ones(40_000_000, np.float64)
    assert peak_memory_bytes() >= max(before, block.nbytes)


def test_json_is_strict_and_makes_its_folder(tmp_path):
    file = tmp_path / "new" / "numbers.json"
    data = {"a": np.float32(1.5), "b": [float("nan"), np.inf], "c": np.arange(3), "d": Path("x/y")}
    write_json(file, data | {3: ("é", None, True)})
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "a": 1.5,
        "b": [None, None],
        "c": [0, 1, 2],
        "d": "x/y",
        "3": ["é", None, True],
    }
    assert [path.name for path in file.parent.iterdir()] == ["numbers.json"]
