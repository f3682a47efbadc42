"""`sinkjax train`: presets and flags, what it leaves, Ctrl-C, and input it refuses."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkjax.cli import main, train
from sinkjax.models import load, preset
from sinkjax.train import OptimizerConfig, Run, RunConfig, from_json, read_metrics

RUN = "import sys; from sinkjax.cli import main; sys.exit(main(sys.argv[1:]))"
FULL = """
import json, resource, sys
from sinkjax.cli import main, train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
print([main(argv) for argv in json.loads(sys.argv[2])])
"""


def _start(script, *words):
    # Reading compiled programs is fine, writing them would meet the limit first.
    env = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        env=os.environ | env,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def test_flags_override_the_preset_and_the_record_is_whole(trained):
    folder = Path(trained.folder)
    config = from_json(RunConfig, (folder / "config.json").read_text())
    assert config.model == dataclasses.replace(
        preset("tiny"),
        model_dim=22,
        num_layers=1,
        num_heads=3,
        head_dim=10,
        mlp_dim=17,
        context_length=19,
    )
    assert config.path == trained.folder and config.steps == 12 and config.data.batch_size == 5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["seed"] == 0
    assert summary["parameters"] == 2 * 257 * 22 + 22 * (2 * 30 + 2 * 10 + 3 * 17 + 3)
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert summary["validation"] == last and last["split"] == "validation"
    assert {"versions", "device", "seconds", "peak_memory_bytes"} < set(summary)


def test_a_finished_run_is_told_again_and_keeps_its_record(trained, capsys):
    before = (Path(trained.folder) / "summary.json").read_bytes()
    assert main(trained.argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{trained.folder}: 12 steps, 14,256 parameters, validation loss ")
    assert f"next: sinkjax generate '{trained.folder}'\n" in out and err == ""
    assert (Path(trained.folder) / "summary.json").read_bytes() == before


def test_ctrl_c_saves_and_prints_the_line_that_goes_on(train_argv, text, tmp_path):
    out = tmp_path / "a run"
    often = ("--log-every", "1", "--eval-every", "1000", "--checkpoint-every", "1000")
    words = train_argv(out, text, *often, "--steps", "150")
    process = _start(RUN, *words)
    deadline = time.monotonic() + 240
    while not any(record["step"] >= 2 for record in read_metrics(out / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate()
    assert process.returncode == 130 and said == "" and "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("sinkjax train: interrupted; go on with: sinkjax train --preset tiny ")
    saved = [int(path.name) for path in (out / "checkpoints").iterdir()]
    assert len(saved) == 1 and 2 <= saved[0] < 150
    assert not (out / "summary.json").exists()
    # That the same config goes on, bit for bit, is tested with `fit`.
    assert shlex.split(line.partition("go on with: sinkjax ")[2]) == list(words)


def test_sigterm_is_told_with_the_line_that_goes_on_and_status_0(
    trained, train_argv, text, tmp_path, monkeypatch, capsys
):
    model, _ = load(trained.folder)
    config = from_json(RunConfig, (Path(trained.folder) / "config.json").read_text())
    done = Run(model, config, [], tmp_path, 7, interrupted=True, preempted=True)
    monkeypatch.setattr("sinkjax.train.loop.fit", lambda config: done)
    words = train_argv(tmp_path / "a run", text)
    assert main(words) == 0 and not (tmp_path / "summary.json").exists()
    out, err = capsys.readouterr()
    said = "sinkjax train: stopped by SIGTERM at step 7; saved; go on with: "
    assert out == "" and err == f"{said}{shlex.join(['sinkjax', *words])}\n"


def test_a_full_disk_is_one_line_and_nothing_is_half_written(train_argv, trained, text, tmp_path):
    out, file = tmp_path / "run", tmp_path / "e.json"
    commands = [
        train_argv(out, text),
        ("evaluate", trained.folder, "--policies", "window", "--json", str(file)),
    ]
    said, err = (process := _start(FULL, "700", json.dumps(commands))).communicate()
    assert process.returncode == 0 and said.splitlines()[-1] == "[2, 2]", (said, err)
    lines = [line for line in err.splitlines() if line.startswith("sinkjax ")]
    assert lines == [
        f"sinkjax train: error: File too large: {out / 'config.json'}",
        f"sinkjax evaluate: error: File too large: {file}",
    ]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not list(out.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--preset tinny", "preset: expected one of tiny, small, gpt2, "),
        ("--preset=tinny", "got 'tinny'"),
        ("--variant gates", "variant: expected one of softmax; softmax1; "),
        ("--recipe ops", "recipe: expected one of gu, "),
        ("--variant differential", "differential: expected even num_heads"),
        ("--model.normalizer softmaxx", "normalizer: expected one of softmax, softmax1, "),
        ("--model.num-heads 5 --model.num-kv-heads 2", "multiple of num_kv_heads=2, got 5"),
        ("--model.windows 0", "window: expected at least 1 or None, got 0"),
        ("--model.gate half", "Expected one of ('none', 'elementwise', 'headwise'"),
        ("--steps 0", "steps: expected at least 1, got 0"),
        ("--optimizer.name sgd", "Expected one of ('adamw', 'muon', 'orthoadam')"),
        (
            "--distributed.mode explicit",
            "coordinator: expected a value with distributed.mode='expl",
        ),
        ("--distributed.process-id 1", "process_id: expected none without distributed.mode='expl"),
        ("--stepz 3", "Unrecognized options: --stepz, 3; perhaps --steps INT"),
        ("--data.files {0}/none.txt", "data.files: expected text files, '{0}/none.txt' names none"),
        ("--data.files {0}/empty.txt", "is empty"),
        ("--data.tokenizer {0}/none.json", "{0}/none.json"),
        ("--mesh.model 5 --data.files {1}", "expected a divisor of 1 devices, got 5"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(says, text, tmp_path, words, expected):
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "run"
    line = says("train", "--out", str(out), *words.format(tmp_path, text).split())
    assert line.startswith("sinkjax train: error: ") and expected.format(tmp_path) in line
    assert not out.exists()


def test_unreadable_data_is_one_line(says, train_argv, text, tmp_path, monkeypatch):
    def refuse(path):  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    line = says(*train_argv(tmp_path / "run", text))
    assert f"data.files: cannot read {text}" in line and "Permission denied" in line


def test_another_config_in_the_folder_is_refused_by_name(says, trained):
    line = says(*trained.argv, "--optimizer.learning-rate", "0.5")
    assert "optimizer.learning_rate" in line and trained.folder in line


def test_variant_and_recipe_are_defaults_that_flags_override():
    argv = ["--variant", "sigmoid, bias -ln T", "--recipe=osp", "--preset", "small"]
    found = train.default(argv)
    assert (found.preset, found.variant, found.recipe) == ("small", "sigmoid, bias -ln T", "osp")
    assert found.model.normalizer == "sigmoid(bias=-5.5452)"  # ln 256
    assert found.model.norm == "single_scale" and found.model.num_layers == 6
    assert found.optimizer.name == "muon"
    plain = train.default([])
    assert plain.model == preset("tiny") and plain.optimizer == OptimizerConfig()
