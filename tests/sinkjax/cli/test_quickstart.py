"""The quickstart, whole but with few steps: every part runs and everything promised is there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from sinkjax.cli import main, quickstart
from sinkjax.cli.entry import COMMANDS, parse


def test_everything_promised_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "SHOWN", quickstart.SHOWN[:2])
    out = tmp_path / "quick"
    flags = ["--steps", "8", "--text-steps", "8", "--stream-tokens", "150", "--seed", "3"]
    assert main(["quickstart", "--out", str(out), *flags]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["peak_memory_bytes"] > 0 and summary["seconds"] > 0
    assert {"sinkjax", "jax", "flax", "python"} <= set(summary["versions"])
    assert list(summary["variants"]) == ["softmax", "softmax1"]
    # After 8 steps attention is still about uniform: the mean over queries 1..31 of 1/(t + 1).
    assert 0.05 < summary["variants"]["softmax"]["attention_to_bos"] < 0.2
    stream = summary["stream"]
    assert stream["tokens"] == 150 and stream["cache_bytes_constant"]
    assert stream["cache_slots"] == stream["context_length"] == 64
    # "def " and BOS come before the 150 tokens, and the last of those is not yet in the cache.
    assert stream["evicted"] == 5 + 150 - 1 - 64
    assert set(summary["policies"]) == {"recompute", "window", "sink_window"}
    for policy in summary["policies"].values():
        assert 4 < policy["nll_beyond"] < 6.5  # near ln 257 = 5.55: hardly trained
    printed = capsys.readouterr().out
    for number in ("attention_to_bos", "loss"):
        assert f"{summary['variants']['softmax1'][number]:.3f}" in printed
    for command in quickstart.next_commands(quickstart.Quickstart(out)):
        assert command in re.sub(r"\s+", " ", printed)
    page = (out / "report.html").read_text()
    assert page.count("<img") >= 6 and "http" not in re.sub(r"data:[^\"]+", "", page)
    assert (out / "figures" / "what_a_sink_is.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "text" / "config.json").exists()  # a run like any other: generate, analyze


@pytest.mark.parametrize("flag", ["--steps", "--text-steps", "--stream-tokens"])
def test_bad_sizes(flag, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "q"), flag, "0"]) == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_ctrl_c_ends_the_run_in_the_thread_too():
    waiting = []
    with pytest.raises(KeyboardInterrupt), quickstart._thread() as (submit, stop):
        waiting.append(submit(stop.wait, 60))
        raise KeyboardInterrupt
    assert waiting[0].result(timeout=0) is True  # told to stop, and waited for


def test_the_commands_to_try_next_are_commands():
    seen = {}
    for line in quickstart.next_commands(quickstart.Quickstart(Path("runs/a folder"))):
        name, *argv = shlex.split(line)[1:]
        command = COMMANDS[name]
        module = importlib.import_module(f"sinkjax.cli.{name}")
        default = {} if command.default is None else {
            "default": getattr(module, command.default)(argv)
        }  # fmt: skip
        seen[name] = parse(getattr(module, command.config), argv, "sinkjax", **default)
    assert seen["generate"].run == seen["analyze"].run == "runs/a folder/text"
    assert seen["generate"].prompt == "class " and seen["generate"].max_new_tokens == 500
    assert seen["train"].model.normalizer == "softmax1"
