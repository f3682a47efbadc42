"""`sinkjax stream`: the loss of the library on a text of any length, from a file or a pipe."""

import io
import json
import re
import signal
import types

import numpy as np
import pytest

from sinkjax.cache import SinkWindow
from sinkjax.cli import main, stream
from sinkjax.cli.options import open_run
from sinkjax.stream import Session, score

FLAGS = ("--num-sink-tokens", "2", "--window", "9", "--chunk-size", "16")
TEXT = "".join(f"line {n} of a text\n" for n in range(53)).encode() + b"\xff no end of line"


@pytest.fixture(scope="module")
def run(trained):
    return open_run(trained.folder)


@pytest.fixture(autouse=True)
def opened(run, monkeypatch):
    """The run is read from disk once."""
    monkeypatch.setattr(stream, "open_run", lambda folder: run)


@pytest.fixture(scope="module")
def expected(run):
    ids = np.frombuffer(TEXT, np.uint8)
    parts = score(run.model, [ids], cache=SinkWindow(2, 9), lead=(256,), chunk_size=16)
    return np.concatenate([part.nll for part in parts])


@pytest.fixture
def read(trained, monkeypatch, capsys):
    """Give a text on standard input; what came out, and the exit status."""

    def give(content, *flags):
        read1 = content if callable(content) else io.BytesIO(content).read1
        buffer = types.SimpleNamespace(read1=read1)
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=buffer))
        status = main(["stream", trained.folder, "--input", "-", *FLAGS, *flags])
        return (*capsys.readouterr(), status)

    return give


def test_table_and_json_say_what_the_library_measures(trained, tmp_path, capsys, expected):
    source, file, saved = tmp_path / "a text", tmp_path / "new" / "s.json", tmp_path / "s.npz"
    source.write_bytes(TEXT)
    argv = ["stream", trained.folder, "--input", str(source), *FLAGS, "--stretches", "4"]
    assert main([*argv, "--json", str(file), "--save", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out  # no bar and no colours in a pipe
    found = json.loads(file.read_text())
    assert found["tokens"] == len(TEXT) == expected.size
    np.testing.assert_allclose(found["nll"], expected.mean(dtype=np.float64), rtol=1e-6)
    assert found["evicted"] == len(TEXT) - 11  # the last token is not read, and BOS is
    assert found["cache_slots"] == 11 and not found["interrupted"]
    assert {"seed", "versions", "device", "seconds", "peak_memory_bytes"} < set(found)
    rows = found["stretches"]
    assert len(rows) <= 4 and rows[0]["begin"] == 0 and rows[-1]["end"] == expected.size
    assert {row["end"] - row["begin"] for row in rows[:-1]} == {256}
    for row in rows:
        cost = np.exp(expected[row["begin"] : row["end"]].mean(dtype=np.float64))
        so_far = np.exp(expected[: row["end"]].mean(dtype=np.float64))
        np.testing.assert_allclose(row["perplexity"], cost, rtol=1e-5)
        line = rf"{row['begin']:,} - {row['end']:,} +│ +{cost:.3f} +│ +{so_far:.3f} +│"
        assert re.search(line, out), (line, out)
    line = rf"\n{len(TEXT):,} tokens, perplexity {np.exp(found['nll']):.3f}, [\d,]+ tokens/s, .*\n$"
    assert re.search(line, out)
    session = Session.load(saved)
    assert (session.position, session.pending) == (len(TEXT), TEXT[-1])


def test_a_pipe_in_pieces_is_the_same_text(read, expected):
    pieces = iter([TEXT[:1], TEXT[1:40], TEXT[40:41], TEXT[41:], b""])
    out, err, status = read(lambda size: next(pieces))
    assert status == 0 and err == "" and "standard input" in out
    assert f"{len(TEXT):,} tokens, perplexity {np.exp(expected.mean(dtype=np.float64)):.3f}" in out


def test_ctrl_c_ends_with_the_numbers_so_far(read, tmp_path, expected):
    """While it waits for more of a pipe: of the 600 bytes that had come, all whole chunks."""
    pieces = [TEXT[:600]]

    def waits(size):
        if pieces:
            return pieces.pop()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the read goes on")

    out, err, status = read(waits, "--json", str(tmp_path / "s.json"))
    assert status == 130 and err == "sinkjax stream: interrupted\n"
    perplexity = np.exp(expected[:592].mean(dtype=np.float64))
    assert f"592 tokens, perplexity {perplexity:.3f}" in out
    assert json.loads((tmp_path / "s.json").read_text())["interrupted"]


def test_ctrl_c_before_there_is_anything(read):
    out, err, status = read(lambda size: signal.raise_signal(signal.SIGINT))
    assert (out, err, status) == ("", "sinkjax stream: interrupted\n", 130)


def test_ctrl_c_while_it_computes(read, monkeypatch):
    def pressing(*arguments, **options):
        for count, part in enumerate(score(*arguments, **options)):
            if count == 2:
                signal.raise_signal(signal.SIGINT)
            yield part

    monkeypatch.setattr(stream, "score", pressing)
    out, err, status = read(TEXT)
    assert status == 130 and err == "sinkjax stream: interrupted\n" and "48 tokens, perpl" in out


@pytest.mark.parametrize("content", [TEXT, b"word " * 9000, b"x" * 40_000, b"\n", b"a\n" * 20_000])
def test_blocks_end_where_lines_or_words_do(content):
    pieces = [content[i : i + 4099] for i in range(0, len(content), 4099)]
    blocks = list(stream.cut(pieces))
    assert b"".join(blocks) == content
    assert max(map(len, blocks)) <= stream._BLOCK + 4099
    for block, after in zip(blocks, blocks[1:], strict=False):
        assert block.endswith(b"\n") or after.startswith(b" ") or b" " not in block


def test_stretches_stay_few_and_add_up():
    found, costs = stream._Stretches(5, 10), np.random.default_rng(0).random(997)
    for start in range(0, 997, 7):
        found.add(costs[start : start + 7], 0.5)
        assert 1 <= len(found.list) <= 5
    assert found.whole.tokens == 997 and len(found.list) >= 3
    np.testing.assert_allclose(found.whole.nats, costs.sum())
    assert found.whole.seconds == 0.5 * 143


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--input {0}/none.txt", "No such file or directory: {0}/none.txt"),
        ("--input {0}", "Is a directory: {0}"),
        ("--input {0}/empty.txt", "input: expected text, {0}/empty.txt: empty"),
        ("", "--input FILE"),
        ("--input {0}/empty.txt --stretches 1", "stretches: expected at least 2, got 1"),
        ("--input {0}/empty.txt --chunk-size 0", "chunk_size: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(says, trained, tmp_path, words, expected):
    (tmp_path / "empty.txt").write_text("")
    line = says("stream", trained.folder, *words.format(tmp_path).split())
    assert line.startswith("sinkjax stream: error: ") and expected.format(tmp_path) in line
