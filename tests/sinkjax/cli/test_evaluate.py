"""`sinkjax evaluate`: the table and the JSON say what the library measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from sinkjax.cli import main
from sinkjax.models import load
from sinkjax.stream import evaluate


def test_table_and_json_say_what_the_library_measures(trained, text, tmp_path, capsys):
    file = tmp_path / "new" / "e.json"
    source = text / "3.txt"
    argv = ["evaluate", trained.folder, str(source), "--max-tokens", "131", "--window", "9"]
    argv += ["--num-sink-tokens", "2", "--chunk-size", "16", "--json", str(file)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out  # no bar and no colours in a pipe
    found = json.loads(file.read_text())
    model, _ = load(Path(trained.folder).absolute())
    tokens = np.frombuffer(source.read_bytes(), np.uint8)[:131].astype(np.int32)
    wanted = evaluate(model, tokens, num_sink_tokens=2, window=9, lead=(256,), chunk_size=16)
    assert [row["policy"] for row in found["policies"]] == ["recompute", "window", "sink_window"]
    for row in found["policies"]:
        result = wanted[row["policy"]]
        assert row["tokens"] == 131 and row["nll"] == pytest.approx(result.mean, abs=1e-6)
        assert f"{row['perplexity']:.3f}" in out and f"{row['nll_beyond']:.4f}" in out
        curve = found["curves"][row["policy"]]
        assert len(curve["nll"]) == 100 and curve["position"][-1] == 130
        assert curve["nll"][-1] == pytest.approx(result.nll[-1], abs=1e-5)
    # BOS and 10 tokens fill the 11 slots, so token 11 is the first that cannot see everything:
    # until then all policies are one.
    first = [wanted[policy].nll[:11] for policy in ("recompute", "window", "sink_window")]
    np.testing.assert_allclose(first[1:], [first[0]] * 2, atol=1e-5)
    assert found["beyond"] == 11 and found["settings"]["slots"] == 11
    assert {"seed", "versions", "device", "seconds", "peak_memory_bytes"} < set(found)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("{0}/none.txt", "files: expected text files, '{0}/none.txt' names none"),
        ("{0}/empty.txt", "empty"),
        ("--policies dense", "('recompute', 'window', 'sink_window')"),
        ("--policies", "policies: expected some of recompute, window, sink_window, got none"),
        ("--max-tokens 0", "max-tokens: expected at least 1 or None, got 0"),
        ("--every 0", "every: expected at least 1, got 0"),
        ("--window 16 --policies window", "needs at most context_length=19 slots"),
        ("--num-sink-tokens 19", "num-sink-tokens: expected fewer than the context length 19"),
    ],
)
def test_bad_input_is_one_line(says, trained, tmp_path, words, expected):
    (tmp_path / "empty.txt").write_text("")
    line = says("evaluate", trained.folder, *words.format(tmp_path).split())
    assert line.startswith("sinkjax evaluate: error: ") and expected.format(tmp_path) in line
