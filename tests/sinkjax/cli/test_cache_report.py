"""`sinkjax cache-report`: one thing varies at a time, and the numbers are those of the library."""

import json
from pathlib import Path

import numpy as np
import pytest

from sinkjax.cache import SinkWindow
from sinkjax.cli import main
from sinkjax.models import load
from sinkjax.stream import score


def test_table_json_and_picture(trained, text, tmp_path, capsys):
    source = text / "3.txt"
    argv = ["cache-report", trained.folder, str(source), "--out", str(tmp_path / "new")]
    argv += ["--max-tokens", "61", "--chunk-size", "4", "--num-sink-tokens", "2"]
    argv += ["--sinks", "0", "2", "--policies", "tova", "--budgets", "0.5", "--bits", "4"]
    argv += ["--patterns", "a_shape"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    found = json.loads((tmp_path / "new" / "summary.json").read_text())
    rows = {(row["group"], row["label"]): row for row in found["caches"]}
    assert list(rows) == [
        ("sinks", "0"),
        ("sinks", "2"),
        ("policy", "tova 9"),
        ("bits", "full precision"),
        ("bits", "4 bits"),
        ("bits", "4 bits, sinks too"),
    ]
    for row in rows.values():
        assert f"{row['nll_beyond']:.4f}" in out and f"{row['cache_bytes']:,}" in out
    model, _ = load(Path(trained.folder).absolute())
    tokens = np.frombuffer(source.read_bytes(), np.uint8)[:61].astype(np.int32)
    parts = score(model, [tokens], cache=SinkWindow(2, 17), lead=(256,), chunk_size=4)
    nll = np.concatenate([part.nll for part in parts])
    for name in (("sinks", "2"), ("bits", "full precision")):
        assert rows[name]["nll"] == pytest.approx(nll.mean(), abs=1e-5)
        assert rows[name]["nll_beyond"] == pytest.approx(nll[19:].mean(), abs=1e-5)
    assert found["beyond"] == 19
    size = {label: row["cache_bytes"] for (_, label), row in rows.items()}
    assert size["4 bits, sinks too"] < size["4 bits"] < size["full precision"] == size["0"]
    assert size["tova 9"] < size["0"]
    (kept,) = found["prefill"]
    mean = np.mean(kept["recall"])
    assert kept["pattern"] == "a_shape" and 0.1 < mean < 1 and f"{mean:.1%}" in out
    assert (tmp_path / "new" / "cache_report.png").read_bytes()[1:4] == b"PNG"
    assert {"seed", "versions", "device", "seconds", "peak_memory_bytes"} < set(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max-tokens 1", "max-tokens: expected at least 2 or None, got 1"),
        (
            "--max-tokens 19 --budgets 0.5",
            "expected more than the 19 tokens that fill the cache, got 19",
        ),
        ("--sinks 19", "sinks: expected 0 to 18 of 19 slots, got 19"),
        ("--budgets 1.5", "budgets: expected parts above 0 and at most 1, got 1.5"),
        ("--budgets 0.25", "expected room for 4 sink tokens and 1 recent ones, got 0.25 of 19"),
        ("--policies lru", "expected"),
        ("--bits 3 --budgets 0.5", "expected 2, 4 or 8, got 3"),
        ("--chunk-size 0", "chunk-size: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(says, trained, words, expected):
    line = says("cache-report", trained.folder, *words.split())
    assert line.startswith("sinkjax cache-report: error: ") and expected in line
