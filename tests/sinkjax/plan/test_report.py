"""What is made of a compiler's leavings, and how the compiler is run."""

import dataclasses
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from sinkjax.models import preset
from sinkjax.plan import Job, Ring, compile, decode_mesh, report
from sinkjax.plan.compile import Compiled
from sinkjax.plan.job import read_job, rows_on, train_mesh
from sinkjax.plan.report import KEYS, arithmetic
from sinkjax.plan.topology import Topology
from sinkjax.strict_json import to_json
from sinkjax.train.config import DataConfig, MeshConfig, RunConfig

HERE = Path(__file__).parent
RUN = RunConfig(model=preset("tiny"), data=DataConfig(batch_size=8))
STEP = {
    "mesh": {"data": 8, "model": 1},
    "held": {"parameters": 600, "optimiser": 250, "batch": 50},
}
NUMBERS = {
    "compile_seconds": 1.5,
    "memory": {"arguments": 900, "temporaries": 10, "results": 307, "aliased": 300, "program": 5},
}
REFUSAL = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(21.48G) exceeds available HBM (15.75G)."
)
COMPILED = Compiled(STEP, NUMBERS, (HERE / "gathers.hlo.txt").read_text(), "", "", 2.0)


def test_numbers_by_hand():
    found = report(Job("tpu7x:2x2x1", RUN), COMPILED)
    assert tuple(found.numbers) == KEYS
    # Two devices on a chip; what lies in a donated argument is counted once.
    assert found.bytes_per_chip["total"] == 2 * (900 + 10 + 7 + 5)
    assert found.bytes_per_chip["parameters"] == 1200 and found.hbm_bytes == 192 * 2**30
    assert found.fits and found.chips == 4 and found.devices == 8 and found.compile_seconds == 1.5
    product = 32 * 2 * 8192 * 4096 * 8 * 128
    assert found.flops_per_step["program"] == 8 * product
    assert found.floors["arithmetic"] == pytest.approx(product / (2307e12 / 2))
    sent = 32 * (2 * 127 * 65536 + 2 * 65536 * 127)
    assert found.floors["interconnect"] == pytest.approx(sent / 300e9)
    assert found.floors["exposed"] == pytest.approx(0.75 * sent / 300e9)
    ideal = found.flops_per_step["arithmetic"] / (4 * 2307e12)
    assert found.mfu_estimate == pytest.approx(ideal / found.floors["step"])
    assert found.notes == []


def test_one_byte_more_than_the_chip_has():
    memory = {"arguments": 16 * 2**30, "temporaries": 0, "results": 0, "aliased": 0, "program": 0}
    whole = dataclasses.replace(COMPILED, numbers=NUMBERS | {"memory": memory})
    assert report(Job("v5e:2x4", RUN), whole).fits
    more = dataclasses.replace(COMPILED, numbers=NUMBERS | {"memory": memory | {"program": 1}})
    found = report(Job("v5e:2x4", RUN), more)
    assert not found.fits and found.mfu_estimate is None


def test_operations_of_steps():
    tokens = 8 * 64
    found = arithmetic(Job("v5e:2x4", RUN))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 172) + 64 * 257
    pairs = 2 * 65 / 2 * 64  # layers, visible keys of 64 queries
    assert found["arithmetic"] == tokens * 6 * weights + 8 * 3 * 4 * 64 * pairs
    decoded = arithmetic(Job("v5e:2x4", RUN, Ring(4, 28)))
    assert decoded["arithmetic"] == 8 * (2 * weights + 2 * 4 * 64 * 32)


def test_a_program_that_was_only_laid_out():
    usage = "Memory Space: default (color=0)\nTotal bytes: 977 (977B)\n"
    found = report(Job("v5e:2x4", RUN), dataclasses.replace(COMPILED, numbers=None, usage=usage))
    expected = {"arguments": 900, "temporaries": 77, "total": 977}
    assert found.fits and found.bytes_per_chip == STEP["held"] | expected
    assert (
        found.notes[0].startswith("quick: ") and found.mfu_estimate and found.compile_seconds == 2
    )


def test_a_cache_that_is_copied_is_noted():
    job, held = Job("v5e:2x4", RUN, Ring(4, 28)), {"parameters": 500, "cache": 301, "batch": 4}
    found = report(job, dataclasses.replace(COMPILED, step=STEP | {"held": held}))
    assert found.notes == ["only 300 of the cache's 301 bytes are updated in place"]
    held["cache"] = 9
    assert "larger than the cache" in report(job, dataclasses.replace(
        COMPILED, step=STEP | {"held": held})).notes[0]  # fmt: skip
    held["cache"] = 10
    assert report(job, dataclasses.replace(COMPILED, step=STEP | {"held": held})).notes == []


def test_meshes_for_decoding():
    model = preset("llama3-8b")
    assert decode_mesh(model, Topology("v5e:2x4")) == MeshConfig(model=8)
    assert decode_mesh(model, Topology("v5e:2x2")) == MeshConfig(model=4)
    assert rows_on(MeshConfig(model=8), Topology("v5e:16x16")) == 32
    assert rows_on(MeshConfig(sequence=2, expert=4), Topology("tpu7x:2x2x4")) == 16
    assert rows_on(MeshConfig(data=3, expert=2), Topology("v5e:2x4")) == 6


def test_meshes_for_training():
    dense, experts = preset("llama3-8b"), preset("gpt-oss-20b")
    assert train_mesh(dense, Topology("v5p:4x4x8")) == MeshConfig()
    odd = dataclasses.replace(dense, model_dim=4096 + 64)  # divides by 64 and not by 128
    assert train_mesh(odd, Topology("v5p:4x4x8")) == MeshConfig(model=2)
    # 2,880 divides by 32 and by 64.
    assert train_mesh(experts, Topology("v5p:4x4x8")) == MeshConfig(expert=4)
    assert train_mesh(experts, Topology("v5p:8x8x8")) == MeshConfig(expert=8)
    assert train_mesh(experts, Topology("v5e:1x2")) == MeshConfig(expert=2)


def test_a_job_is_itself_again_behind_json():
    for ring in (None, Ring(3, 29)):
        job = Job("v5e:2x4", RUN, ring, ("a=1",))
        assert read_job(to_json(job)) == job
    with pytest.raises(ValueError, match="job: unknown keys rung"):
        read_job('{"rung": 1}')


def test_options_are_names_and_values():
    job = Job("v5e:2x4", RUN, compiler_options=("a=1", "b=c=d"))
    assert job.options == {"a": "1", "b": "c=d"}
    with pytest.raises(ValueError, match="compiler-options: expected name=value, got 'a'"):
        Job("v5e:2x4", RUN, compiler_options=("a",))


def test_without_the_compiler_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sinkjax\[tpu\]'"):
        compile.compile_step(Job("v5e:2x4", RUN))


def test_an_interrupt_ends_the_compiler(monkeypatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, words, **settings):
            started.append((self, words, settings["env"]))
            super().__init__(["sleep", "300"], **settings)

    def interrupt(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    before = dict(os.environ)
    with pytest.raises(KeyboardInterrupt):
        compile.compile_step(Job("v5e:2x4", RUN), progress=interrupt)
    ((process, words, env),) = started
    assert process.returncode == -9 and dict(os.environ) == before
    # A cached program would leave no text; the caller's platform and flags stay its own.
    assert "JAX_COMPILATION_CACHE_DIR" not in env and env["JAX_PLATFORMS"] == "cpu"
    assert words[1:3] == ["-m", "sinkjax.plan.child"] and not Path(words[3]).exists()


def test_what_the_process_leaves(tmp_path):
    (tmp_path / "log").write_text("first\nSegmentation fault\n")
    with pytest.raises(RuntimeError, match="status -11: first\nSegmentation fault"):
        compile._collect(tmp_path, -11, 1.0)
    refused = tmp_path / "refused.json"
    refused.write_text(json.dumps({"kind": "input", "text": "batch: expected a multiple of 4"}))
    with pytest.raises(ValueError, match="batch: expected a multiple of 4"):
        compile._collect(tmp_path, 2, 1.0)
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    refused.write_text(json.dumps({"kind": "memory", "text": REFUSAL}))
    found = compile._collect(tmp_path, 1, 1.0)
    assert found.numbers is None and found.hlo == ""
    answer = report(Job("v5e:2x4", RUN), found)
    assert not answer.fits and answer.mesh == STEP["mesh"] and answer.mfu_estimate is None
    temporaries = round(21.48 * 2**30)
    expected = {"arguments": 900, "temporaries": temporaries, "total": 900 + temporaries}
    assert answer.bytes_per_chip == STEP["held"] | expected
    (tmp_path / "compiled.json").write_text(json.dumps(NUMBERS))
    (tmp_path / "xla").mkdir()
    for name in ("module_0.jit_other", "module_7.jit_step.cl_1"):
        (tmp_path / "xla" / f"{name}.after_optimizations.txt").write_text(name)
    found = compile._collect(tmp_path, 0, 1.0)
    assert found.numbers == NUMBERS and found.hlo == "module_7.jit_step.cl_1" and found.usage == ""
