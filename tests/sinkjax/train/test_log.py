"""metrics.jsonl holds whole lines, and only those of the run that goes on."""

import json

import jax.numpy as jnp
import numpy as np

from sinkjax.models import preset
from sinkjax.sharding import make_mesh
from sinkjax.train import log as module
from sinkjax.train.log import MetricsLog, Progress, read_metrics


def test_records_become_plain_json_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.write({"step": 0, "table": jnp.asarray([[1.0, jnp.inf], [0.1, jnp.nan]]), "n": np.int64(3)})
    log.write({"step": 5, "loss": np.float32(0.1)})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # float32 goes through JSON unchanged, and what is not finite is null.
    expected = [
        {"step": 0, "table": [[1.0, None], [float(np.float32(0.1)), None]], "n": 3},
        {"step": 5, "loss": float(np.float32(0.1))},
    ]
    assert lines == expected == log.records == read_metrics(path)


def test_resuming_cuts_back_to_the_step_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 7, "split": "a"}\n{"step": 7}\n{"step": 8}\n{"step": 9')
    assert [r["step"] for r in read_metrics(path)] == [3, 7, 7, 8]
    log = MetricsLog(path, 7)
    log.write({"step": 8, "new": True})
    assert path.read_text().splitlines() == [
        '{"step": 3}',
        '{"step": 7, "split": "a"}',
        '{"step": 7}',
        '{"step": 8, "new": true}',
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    MetricsLog(tmp_path / "metrics.jsonl", -1).write({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_speed_is_that_of_all_of_one_device_and_as_a_share_of_its_peak(monkeypatch):
    found = module.speed(preset("tiny"), make_mesh(), 3e5)
    assert found == {"tokens_per_second": 3e5, "tokens_per_second_per_device": 3e5}
    monkeypatch.setattr(module, "utilization", lambda *given: (asked.append(given), 0.25)[1])
    asked = []
    assert module.speed(preset("tiny"), make_mesh(), 3e5) == found | {"mfu": 0.25}
    assert asked == [(preset("tiny"), 3e5, "cpu", 1)]


def test_progress_shows_step_loss_and_speed_and_is_quiet_without_a_terminal(capfd):
    with Progress(10, 0) as bar:
        bar.update(5, 1.25, 3210.0)
    assert capfd.readouterr() == ("", "")
    with Progress(10, 4, show=True) as bar:
        bar.update(5, 1.25, 3210.0)
    shown = capfd.readouterr().err
    assert "5/10" in shown and "1.2500" in shown and "3,210 tokens/s" in shown
