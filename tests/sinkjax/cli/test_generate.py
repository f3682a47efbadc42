"""`sinkjax generate`: the stream of the library, on a terminal."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest

from sinkjax.cache import SinkWindow
from sinkjax.cli import main
from sinkjax.models import load
from sinkjax.stream import Sampler, generate
from sinkjax.train import ByteTokenizer

FLAGS = ("--max-new-tokens", "30", "--seed", "5", "--num-sink-tokens", "2", "--window", "9")
SAMPLER = ("--temperature", "0.7", "--top-k", "40")


@pytest.fixture(scope="module")
def expected(trained):
    model, _ = load(Path(trained.folder).absolute())
    events = generate(
        model,
        "sinks",
        cache=SinkWindow(2, 9),
        sampler=Sampler(temperature=0.7, top_k=40),
        seed=5,
        max_new_tokens=30,
        tokenizer=ByteTokenizer(),
    )
    return "".join(event.text for event in events)


class Terminal(io.StringIO):
    """What had been written at each flush."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        self.shown.append(self.getvalue())


def test_text_comes_out_token_by_token_and_numbers_after_it(trained, expected, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["generate", trained.folder, "sinks", *FLAGS, *SAMPLER]) == 0
    assert terminal.getvalue() == expected and len(expected) > 20
    assert len(set(terminal.shown)) > 20  # one token after the other, not all at the end
    # BOS, 5 bytes and 29 of the 30 tokens went through 2 + 9 slots.
    line = r"\n30 tokens, [\d,]+ tokens/s, 24 evicted, cache [\d,]+ bytes in 11 slots\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_the_prompt_may_come_from_a_pipe_and_the_run_from_a_relative_path(
    trained, expected, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("sinks"))
    monkeypatch.chdir(Path(trained.folder).parent)
    assert main(["generate", Path(trained.folder).name, *FLAGS, *SAMPLER]) == 0
    assert capsys.readouterr().out == expected


def test_a_terminal_gets_no_control_characters(trained, capsys, monkeypatch):
    terminal = Terminal()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    # Twelve steps of training: almost every byte is drawn.
    argv = ["generate", trained.folder, "sinks", *FLAGS[2:], "--max-new-tokens", "300"]
    assert main([*argv, "--temperature", "50"]) == 0
    shown = terminal.getvalue()
    assert len(shown) > 100 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--window 0", "window: expected an integer of at least 1, got 0"),
        ("--num-sink-tokens -1", "num_sink_tokens: expected an integer of at least 0, got -1"),
        (
            "--num-sink-tokens 4 --window 16",
            "context_length=19 slots, got num_sink_tokens + window = 20",
        ),
        ("--position-mode relative", "Expected one of ('cache_relative', 'absolute')"),
        ("--temperature -1", "temperature: expected a finite number of at least 0, got -1"),
        ("--max-new-tokens -1", "max_new_tokens: expected at least 0 or None, got -1"),
        ("--max-tokens 3", "Unrecognized options: --max-tokens, 3; perhaps --max-new-tokens"),
    ],
)
def test_bad_input_is_one_line(says, trained, words, expected):
    line = says("generate", trained.folder, "sinks", *words.split())
    assert line.startswith("sinkjax generate: error: ") and expected in line


def test_no_run_and_a_checkpoint_of_another_shape_are_one_line(says, trained, tmp_path):
    assert "expected a run folder" in says("generate", str(tmp_path / "none"), "sinks")
    assert "RUN" in says("generate")
    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["mlp_dim"] = 16
    (copy / "config.json").write_text(json.dumps(config))
    line = says("generate", str(copy), "sinks")
    assert "parameter blocks/0/mlp/down/kernel: expected (16, 22), got (17, 22)" in line
    config["model"]["mlp_dimm"] = 16
    (copy / "config.json").write_text(json.dumps(config))
    assert "mlp_dimm" in says("generate", str(copy), "sinks")
