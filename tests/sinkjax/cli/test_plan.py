"""`sinkjax plan`: flags to a job, the table and the JSON, exit statuses."""

import dataclasses
import importlib.util
import json

import pytest

from sinkjax.cli import main, plan
from sinkjax.models import preset
from sinkjax.plan import Plan, Ring
from sinkjax.plan.buffers import Buffer
from sinkjax.plan.report import KEYS
from sinkjax.train.config import MeshConfig


def parsed(*argv):
    from sinkjax.cli.entry import parse

    return plan.job(parse(plan.PlanCommand, argv, "sinkjax plan", default=plan.default(argv)))


def test_fsdp_over_all_chips_with_a_row_on_each():
    job = parsed("tiny", "--topology", "v5e:4x4")
    assert job.run.model == preset("tiny") and job.ring is None
    assert job.run.mesh == MeshConfig() and job.rows == 16
    job = parsed("tiny", "--topology", "v5e:4x4", "--mesh.model", "4", "--mesh.sequence", "2",
                 "--optimizer.accumulation-steps", "3")  # fmt: skip
    assert job.rows == 2 * 3 and job.run.mesh == MeshConfig(model=4, sequence=2)
    assert parsed("tiny", "--batch", "48").rows == 48 and parsed("tiny").topology == "v5p:4x4x8"


def test_long_contexts_and_windows():
    job = parsed(
        "--context-length", "131072", "llama3-8b", "--window=1024", "--num-sink-tokens", "4"
    )
    model = job.run.model
    assert (model.context_length, model.windows, model.num_sink_tokens) == (131072, (1024,), 4)
    expected = {"context_length": 131072, "windows": (1024,), "num_sink_tokens": 4}
    assert model == dataclasses.replace(preset("llama3-8b"), **expected)
    assert parsed("tiny", "--model.windows", "8").run.model.windows == (8,)


def test_decoding_cuts_heads_and_keeps_sinks_and_a_window():
    job = parsed("--decode", "llama3-8b", "--topology", "v5e:4x4")
    assert job.run.mesh == MeshConfig(model=8) and job.rows == 16 * 2
    assert job.ring == Ring(4, 8188) and job.run.model == preset("llama3-8b")
    job = parsed("llama3-8b", "--decode", "--window", "1020", "--num-sink-tokens", "0")
    assert job.ring == Ring(0, 1020)
    assert parsed("llama3-8b", "--decode", "--mesh.model", "2").run.mesh.model == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "preset: expected one of tiny, "),
        ("llama4", "preset: expected one of tiny, "),
        ("tiny --topology v9:2x2", "topology: expected one of v4, v5e, v5p, v6e, tpu7x"),
        ("tiny --topology=v5p:2x2 --decode", "topology: expected 3 sizes for v5p"),
        ("tiny --compiler-options xla_a", "compiler-options: expected name=value, got 'xla_a'"),
        ("tiny --batch 0", "data.batch_size: expected at least 1, got 0"),
        ("tiny --mesh.model 0", "mesh.model: expected at least 1"),
    ],
)
def test_bad_input_is_one_line(says, words, expected):
    line = says("plan", *words.split())
    assert line.startswith("sinkjax plan: error: ") and expected in line


def test_without_libtpu_it_says_what_to_install(says, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sinkjax[tpu]'" in says("plan", "tiny", "--topology", "v5e:2x2")


def answer(job, **changes):
    row = {"count": 64, "bytes": 3e9, "asynchronous_count": 32, "asynchronous_bytes": 1.5e9,
           "overlapped_count": 31, "overlapped_bytes": 1.25e9}  # fmt: skip
    fields = {
        "job": job,
        "mesh": {"data": 8, "model": 1},
        "fits": True,
        "bytes_per_chip": {"parameters": 3, "arguments": 2**30, "total": 3 * 2**30},
        "hbm_bytes": 16 * 2**30,
        "collectives": {"all-gather": row},
        "flops_per_step": {"arithmetic": 2e12, "recomputed": 5e11, "program": 2.5e12},
        "floors": {
            "arithmetic": 0.5,
            "memory": 0.2,
            "interconnect": 0.1,
            "exposed": 0.05,
            "step": 0.55,
        },
        "mfu_estimate": 0.625,
        "compile_seconds": 61.5,
        "chips": 4,
        "devices": 8,
        "buffers": [Buffer(2**31, "f32[8192,128256]", "jit(step)/logits")],
        "notes": ["2 loops of unknown length count as one round"],
    }
    return Plan(**(fields | changes))


def run(monkeypatch, *words, **changes):
    monkeypatch.setattr("sinkjax.plan.plan", lambda job, quick, progress: answer(job, **changes))
    monkeypatch.setenv("COLUMNS", "120")
    return main(["plan", "tiny", "--topology", "tpu7x:2x2x1", *words])


def test_the_table_and_the_same_as_json(monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.json"
    assert run(monkeypatch, "--json", str(path)) == 0
    out, err = capsys.readouterr()
    assert err == "" and "8 rows of 64 tokens, tpu7x:2x2x1 (4 chips, 8 devices), mesh data 8" in out
    for words in ("3,221,225,472", "MFU, an optimistic estimate", "62.5%", "count as one round"):
        assert words in out
    assert "fits: 3.00 GiB of 16.00 GiB on each chip" in out
    found = json.loads(path.read_text())
    record = {"seed", "versions", "device", "seconds", "peak_memory_bytes"}
    assert set(found) == {*KEYS, *record} and found["device"].startswith("compiled for 4 x tpu7x")
    assert found["collectives"]["all-gather"]["overlapped_count"] == 31 and found["fits"] is True


def test_what_does_not_fit_names_the_largest_buffers_and_fails(monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.json"
    nothing = {"floors": {}, "collectives": {}, "mfu_estimate": None}
    total = {"bytes_per_chip": {"total": 20 * 2**30}}
    assert run(monkeypatch, "--json", str(path), fits=False, **nothing, **total) == 1
    out, _ = capsys.readouterr()
    assert "does not fit: 20.00 GiB of 16.00 GiB on each chip; the largest buffers:" in out
    assert "2.00 GiB  f32[8192,128256]  jit(step)/logits" in out
    assert json.loads(path.read_text())["fits"] is False
