"""The decode step of a large model, compiled for chips that are not there, and what is said about it."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sinkjax.cache import SinkWindow
from sinkjax.models import preset

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("decode_on_tpu")
    sys.path.remove(str(FOLDER))
    del sys.modules["decode_on_tpu"]


class Compiled:
    def __init__(self, arguments=900, temp=10, alias=300):
        self.memory = SimpleNamespace(
            argument_size_in_bytes=arguments,
            temp_size_in_bytes=temp,
            output_size_in_bytes=alias + 7,
            alias_size_in_bytes=alias,
            generated_code_size_in_bytes=5,
        )

    def memory_analysis(self):
        return self.memory


@pytest.mark.parametrize(
    ("compiled", "wrong"),
    [
        (Compiled(), []),
        (Compiled(arguments=2**30), ["above"]),
        (Compiled(alias=299), ["only 299 bytes of the cache's 300"]),
        (Compiled(temp=151), ["temporaries"]),
    ],
)
def test_verdict(experiment, compiled, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "compile_step", lambda *how: (compiled, 300))
    config = experiment.Experiment(limit=0.5, json=tmp_path / "found.json")
    assert experiment.main(config) == len(wrong)
    found = json.loads(config.json.read_text())
    assert found["claim_holds"] is not wrong and len(found["wrong"]) == len(wrong)
    assert all(word in found["wrong"][0] for word in wrong)
    memory = compiled.memory
    # What lies in a donated argument is counted once.
    assert found["total"] == memory.argument_size_in_bytes + memory.temp_size_in_bytes + 7 + 5
    assert f"{found['total']:,}" in capsys.readouterr().out


@pytest.mark.tpu_aot
def test_a_chip_holds_its_part_of_the_cache_once(experiment, monkeypatch):
    """Two layers of the 8B preset: kernels in place, and nothing of the cache moves."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    shape = dataclasses.replace(preset("llama3-8b"), num_layers=2)
    rows, slots = 6, 4096
    compiled, held = experiment.compile_step(
        shape, SinkWindow(4, slots - 4), rows, "v5e:2x4", model=4
    )
    assert held == rows // 2 * (2 * 2 * 8 // 4 * slots * 128 * 2 + slots * 4 + 4)
    sizes = experiment.bytes_per_chip(compiled)
    assert sizes["aliased"] >= held and sizes["total"] > sizes["arguments"]
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    made = re.findall(r" = \(?(\w+\[[\d,]*\])\S* (\S+?)\(", text[text.index("ENTRY") :])
    handled = {op for shape, op in made if shape == f"bf16[{rows // 2},2,{slots},128]"}
    assert handled <= {"parameter", "get-tuple-element", "bitcast", "tuple", "custom-call"}
    assert "parameter" in handled
