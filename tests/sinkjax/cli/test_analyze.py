"""`sinkjax analyze`: numbers, pictures, one page."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest

from sinkjax.cli import main
from sinkjax.diagnose import analyze
from sinkjax.models import load


def test_page_pictures_and_summary(trained, text, tmp_path, capsys):
    out, source = tmp_path / "out", text / "3.txt"
    argv = ["analyze", trained.folder, str(source), "--out", str(out), "--max-rows", "7"]
    metrics = ("sink_rate", "importance")
    assert main([*argv, "--epsilon", "0.19", "--metrics", *metrics]) == 0
    said, err = capsys.readouterr()
    assert err == "" and "\x1b" not in said and str(out / "report.html") in said
    found = json.loads((out / "summary.json").read_text())
    # Rows of 18 bytes, BOS first, as in training.
    body = np.frombuffer(source.read_bytes(), np.uint8)[: 7 * 18].reshape(7, 18)
    rows = np.concatenate([np.full((7, 1), 256), body], axis=1).astype(np.int32)
    model, _ = load(Path(trained.folder).absolute())
    importance = analyze(model, rows, metrics=["importance"]).arrays["importance"]
    np.testing.assert_allclose(found["arrays"]["importance"], importance, atol=1e-6)
    assert found["metadata"]["sequences"] == 7
    assert found["metadata"]["settings"]["epsilon"] == 0.19
    assert 0 <= found["scalars"]["sink_rate"] <= 1 and "sink_rate" in said
    assert {"seed", "versions", "device", "seconds", "peak_memory_bytes"} < set(found)
    pictures = sorted(path.name for path in (out / "figures").iterdir())
    assert "attention-maps-of-the-first-sequence.png" in pictures
    assert "how-the-sink-formed-in-training.png" in pictures
    assert all((out / "figures" / name).read_bytes()[1:4] == b"PNG" for name in pictures)
    page = (out / "report.html").read_text()
    assert page.count("<figure") == len(pictures) and page.rstrip().endswith("</html>")
    # Once more with a disk that is full: a real limit, here since the programs are compiled.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv[argv.index(str(out))] = full = str(tmp_path / "full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert main([*argv, "--epsilon", "0.19", "--metrics", *metrics]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said, err = capsys.readouterr()
    assert said == "" and err.startswith("sinkjax analyze: error: File too large: ")
    assert err.count("\n") == 1 and full in err
    assert not [path for path in Path(full).rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--metrics sinks", "metrics: expected some of sink_rate, importance, "),
        ("--epsilon 2", "epsilon: expected a share in [0, 1], got 2"),
        ("--position 19", "position: expected below 19 tokens, got 19"),
        ("--max-rows 0", "max-rows: expected at least 1, got 0"),
        ("{0}/none.txt", "files: expected text files, '{0}/none.txt' names none"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(says, trained, tmp_path, words, expected):
    argv = ("analyze", trained.folder, "--out", str(tmp_path / "out"))
    line = says(*argv, *words.format(tmp_path).split())
    assert line.startswith("sinkjax analyze: error: ") and expected.format(tmp_path) in line
    assert not (tmp_path / "out").exists()
