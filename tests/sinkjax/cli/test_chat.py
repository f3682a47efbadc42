"""`sinkjax chat`: the conversation of the library, from a pipe and at a prompt."""

import io
import re
import signal

import pytest

from sinkjax.cache import SinkWindow
from sinkjax.cli import chat as cli_chat
from sinkjax.cli import main
from sinkjax.cli.options import open_run
from sinkjax.stream import Chat, Sampler, Session
from sinkjax.train import ByteTokenizer

FLAGS = ("--max-new-tokens", "12", "--num-sink-tokens", "2", "--window", "9")
NUMBERS = r"\[12 tokens, [\d,]+ tokens/s, {} evicted, cache [\d,]+ bytes in 11 slots\]"


@pytest.fixture(scope="module")
def run(trained):
    return open_run(trained.folder)


@pytest.fixture(scope="module")
def expected(run):
    """The answers to three turns."""
    chat = Chat(
        run.model,
        cache=SinkWindow(2, 9),
        tokenizer=ByteTokenizer(),
        sampler=Sampler(),
        max_new_tokens=12,
        chunk_size=64,
    )
    return ["".join(e.text for e in chat.send(line)) for line in ("one", "two", "one")]


@pytest.fixture(autouse=True)
def opened(run, monkeypatch):
    """The run is read from disk once."""
    monkeypatch.setattr(cli_chat, "open_run", lambda folder: run)


@pytest.fixture
def chat(trained, monkeypatch, capsys):
    """Type these lines; what came out on both streams, and the exit status."""

    def say(typed, *flags, terminal=False):
        stdin = io.StringIO(typed)
        stdin.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stdin)
        status = main(["chat", trained.folder, *FLAGS, *flags])
        return (*capsys.readouterr(), status)

    return say


def test_a_line_is_a_turn_and_numbers_follow(chat, expected):
    out, err, status = chat("one\n\n  two  \n")
    assert status == 0 and out == f"{expected[0]}\n{expected[1]}\n"
    # BOS, "one\n" and 11 of 12 tokens; the last of them, "\n", "two\n" and 11 more.
    lines = [NUMBERS.format(16 - 11), NUMBERS.format(16 + 1 + 5 + 11 - 11)]
    assert re.fullmatch("\n".join(lines) + "\n", err), err


def test_commands(chat, expected, tmp_path):
    file = tmp_path / "new" / "s.npz"
    out, err, status = chat(f"/stats\none\n/save {file}\n/save\n/sing\n/reset\none\n/quit\ntwo\n")
    assert status == 0 and out == f"{expected[0]}\n" * 2
    lines = err.splitlines()
    assert re.fullmatch(r"\[0 tokens read, 0 evicted, cache [\d,]+ bytes in 11 slots\]", lines[0])
    assert lines[2] == f"[saved {file}; go on with --session {file}]"
    assert [
        line.partition(" is no command; expected one of /reset, /save PATH")[0]
        for line in lines[3:5]
    ] == ["['/save'", "['/sing'"]
    assert lines[5] == "[a new conversation]" and len(lines) == 7
    out, err, _ = chat("two\n/stats\n", "--session", str(file), "--window", "3")
    assert out == f"{expected[1]}\n" and "[33 tokens read, 22 evicted, cache" in err


def test_at_a_prompt(chat, expected, tmp_path):
    (tmp_path / "file").touch()
    out, err, status = chat(
        f"{'x' * 30}\n/save {tmp_path}/file/s\none\n", "--overlength", "error", terminal=True
    )
    assert status == 0 and out == f"{expected[0]}\n"
    lines = err.splitlines()
    assert re.match(
        r"\[cache [\d,]+ bytes in 11 slots; /reset, .* Ctrl-C stops an answer\]", lines[0]
    )
    # Someone sits there: what went wrong is said, and the conversation goes on.
    assert lines[1].startswith("> [prompt: expected at most the 11 tokens")
    assert lines[2].startswith("> [") and lines[2].endswith(f": {tmp_path}/file/s]")
    assert lines[3].startswith("> [12 tokens")


class Pressed(io.StringIO):
    """Someone presses Ctrl-C when these characters have been shown."""

    def __init__(self, *counts):
        super().__init__()
        self.counts = [*counts]

    def write(self, text):
        super().write(text)
        if self.counts and len(self.getvalue()) >= self.counts[0]:
            self.counts.pop(0)
            signal.raise_signal(signal.SIGINT)
        return len(text)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(chat, expected, monkeypatch):
    monkeypatch.setattr("sys.stdout", Pressed(2))
    _, err, status = chat("one\n/stats\ntwo\n", terminal=True)
    assert status == 0
    assert re.search(r"> \[\d tokens, .* in 11 slots, stopped\]", err)
    assert re.search(r"> \[12 tokens, .* in 11 slots\]", err)


def test_ctrl_c_ends_a_pipe(chat, monkeypatch):
    monkeypatch.setattr("sys.stdout", Pressed(2))
    _, err, status = chat("one\ntwo\n")
    assert status == 130 and "stopped]\nsinkjax chat: interrupted\n" in err


def test_stop_and_system(chat, expected):
    stop = expected[0][4:6]
    out, _, _ = chat("one\n", "--stop", stop)
    assert out == expected[0][: expected[0].index(stop)] + "\n"
    out, err, _ = chat("one\n/stats\n", "--system", "abc")
    assert out != f"{expected[0]}\n" and f"[{16 + 4} tokens read" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--session {0}/none", "No such file or directory: {0}/none"),
        ("--session {0}/text", "path: {0}/text is not a saved session"),
        ("--session {0}/s --seed 3", "seed: a session has its own (7), got 3"),
        ("--template alpaca", "('plain', 'chatml', 'gemma', 'llama3')"),
        ("--chunk-size 0", "chunk_size: expected at least 1, got 0"),
        (
            "--overlength error",
            "prompt: expected at most the 11 tokens that the cache has room for",
        ),
    ],
)
def test_bad_input_is_one_line(says, run, trained, tmp_path, monkeypatch, words, expected):
    (tmp_path / "text").write_text("hello")
    Session.start(run.model, SinkWindow(2, 9), seed=7).save(tmp_path / "s")
    monkeypatch.setattr("sys.stdin", io.StringIO("a turn of many words\n"))
    line = says("chat", trained.folder, *FLAGS, *words.format(tmp_path).split())
    assert line.startswith("sinkjax chat: error: ") and expected.format(tmp_path) in line
