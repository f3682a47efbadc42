"""Real runs in real processes: killed, interrupted, refused, out of disk."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.models.storage import load
from sinkjax.strict_json import from_json, to_json
from sinkjax.train.config import DataConfig, OptimizerConfig, RunConfig
from sinkjax.train.log import read_metrics
from sinkjax.train.loop import fit

SCRIPT = textwrap.dedent("""
    import resource, sys
    from sinkjax.train import RunConfig, fit, from_json

    config = from_json(RunConfig, open(sys.argv[1]).read())
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        run = fit(config)
    except OSError as error:
        sys.exit(f"error: {error}")
    print("preempted" if run.preempted else "interrupted" if run.interrupted else "done", run.step)
""")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text"
    text.mkdir()
    for i in range(7):
        (text / f"{i}.txt").write_text(f"attention sinks {i * i} " * 40)
    return RunConfig(
        model=DecoderConfig(
            vocab_size=257,
            model_dim=22,
            num_layers=1,
            num_heads=3,
            num_kv_heads=1,
            head_dim=10,
            mlp_dim=17,
            context_length=19,
        ),
        data=DataConfig(files=(str(text),), batch_size=5),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        path=str(folder / "unbroken"),
        steps=60,
        log_every=1,
        eval_every=25,
        eval_batches=2,
        checkpoint_every=10,
        keep_checkpoints=2,
    )


@pytest.fixture(scope="module")
def unbroken(base):
    return fit(base)


def _start(config, tmp_path, *arguments):
    file = tmp_path / "request.json"
    file.write_text(to_json(config))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_step(process, path, step):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(path / "metrics.jsonl")):
            return
        time.sleep(0.002)
    raise AssertionError(f"never reached step {step}: {process.communicate()}")


def _numbers(records):
    # Everything but the speed.
    speeds = ("tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if not k.startswith(speeds)} for r in records]


def test_a_run_learns_and_leaves_a_folder_that_loads(base, unbroken):
    assert not unbroken.interrupted and unbroken.step == 60
    train = [r["loss"] for r in unbroken.metrics if r["split"] == "train"]
    validation = [r for r in unbroken.metrics if r["split"] == "validation"]
    assert len(train) == 60 and [r["step"] for r in validation] == [0, 25, 50, 60]
    assert train[0] == pytest.approx(5.55, abs=0.05)  # ln 257
    assert validation[-1]["nll"] < 3.6
    assert len(validation[-1]["importance"]) == 1 and len(validation[-1]["importance"][0]) == 3
    assert validation[0]["importance"][0][0] == pytest.approx(0.1867, abs=0.01)  # H_19 / 19
    for record in unbroken.metrics:
        speeds = [name for name in record if "tokens_per_second" in name]
        assert len(speeds) == (2 if record["split"] == "train" else 0) and "mfu" not in record
    assert read_metrics(unbroken.path / "metrics.jsonl") == unbroken.metrics
    assert from_json(RunConfig, (unbroken.path / "config.json").read_text()) == base
    model, config = load(unbroken.path)
    assert config == base.model
    kept = sorted(p.name for p in (unbroken.path / "checkpoints").iterdir())
    assert kept == ["50", "60"]


def test_a_finished_run_is_given_back_without_a_step(base, unbroken):
    before = (unbroken.path / "metrics.jsonl").read_bytes()
    again = fit(base)
    assert again.step == 60 and not again.interrupted
    assert (unbroken.path / "metrics.jsonl").read_bytes() == before


def test_kill_9_and_again_equals_the_unbroken_run_bit_for_bit(base, unbroken, tmp_path):
    path = tmp_path / "run"
    config = dataclasses.replace(base, path=str(path))
    process = _start(config, tmp_path)
    _wait_for_step(process, path, 23)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = read_metrics(path / "metrics.jsonl")
    steps = [int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit()]
    assert before[-1]["step"] < 60 and 10 <= max(steps) <= before[-1]["step"]
    again = _start(config, tmp_path)
    out, err = again.communicate()
    assert out == "done 60\n", err
    after = read_metrics(path / "metrics.jsonl")
    assert _numbers(after) == _numbers(unbroken.metrics)
    # It went on from the checkpoint: the speeds before it are those of the first process.
    kept = sum(record["step"] <= max(steps) for record in before)
    assert after[:kept] == before[:kept] and after[kept : kept + 3] != before[kept : kept + 3]


@pytest.mark.parametrize(
    ("number", "word", "said", "every"),  # a checkpoint of that very step is under way, or none
    [
        (signal.SIGINT, "interrupted", "interrupted", 1),
        (signal.SIGTERM, "preempted", "stopped by SIGTERM", 100),
    ],
)
def test_a_signal_saves_says_so_and_goes_on(base, unbroken, tmp_path, number, word, said, every):
    path = tmp_path / "run"
    config = dataclasses.replace(base, path=str(path), checkpoint_every=every)
    process = _start(config, tmp_path)
    _wait_for_step(process, path, 7)
    process.send_signal(number)
    out, err = process.communicate()
    found, step = out.split()
    assert found == word and 7 <= int(step) < 60 and process.returncode == 0
    assert f"{said} at step {step} of 60 and saved in {path}" in err
    assert "Traceback" not in err
    # Where the checkpoint fell does not enter the numbers.
    run = fit(dataclasses.replace(config, checkpoint_every=20))
    assert _numbers(run.metrics) == _numbers(unbroken.metrics)


def test_an_event_ends_a_run_in_a_thread_as_ctrl_c_does(base, unbroken, tmp_path):
    config = dataclasses.replace(base, path=str(tmp_path / "run"), checkpoint_every=60)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fit, config, stop=stop)
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5:
            assert not future.done()
            time.sleep(0.01)
        stop.set()
        run = future.result()
    assert run.interrupted and not run.preempted and 3 <= run.step < 60
    losses = [row["loss"] for row in fit(config).metrics if row["split"] == "train"]
    assert losses == [row["loss"] for row in unbroken.metrics if row["split"] == "train"]


def test_runs_in_threads_save_side_by_side(base, tmp_path):
    """Orbax mixes up saves that overlap in one process; here every step of both runs is one."""
    configs = [
        dataclasses.replace(
            base, path=str(tmp_path / str(n)), steps=12, checkpoint_every=1, keep_checkpoints=30
        )
        for n in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(fit, configs))
    assert [run.step for run in runs] == [12, 12]
    for config in configs:
        saved = {int(p.name) for p in (tmp_path / config.path / "checkpoints").iterdir()}
        assert saved == set(range(1, 13))
        for step in (1, 7, 12):
            load(config.path, step=step)


def test_another_config_is_refused_naming_the_field(base, unbroken):
    optimizer = dataclasses.replace(base.optimizer, learning_rate=2e-2)
    other = dataclasses.replace(base, optimizer=optimizer)
    before = (unbroken.path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="optimizer.learning_rate: .*holds a run with 0.01, got"):
        fit(other)
    with pytest.raises(ValueError, match="model.num_heads"):
        fit(dataclasses.replace(base, model=dataclasses.replace(base.model, num_heads=5)))
    assert (unbroken.path / "config.json").read_bytes() == before


def test_batch_that_does_not_divide_and_bad_data_leave_no_folder(base, tmp_path):
    path = tmp_path / "run"
    data = dataclasses.replace(base.data, files=(str(tmp_path / "none.txt"),))
    with pytest.raises(ValueError, match="none.txt"):
        fit(dataclasses.replace(base, path=str(path), data=data))
    assert not path.exists()


def test_a_loss_that_is_no_number_stops_the_run(base, tmp_path):
    optimizer = dataclasses.replace(base.optimizer, learning_rate=1e30, clip_norm=None)
    config = dataclasses.replace(base, path=str(tmp_path / "run"), optimizer=optimizer)
    with pytest.raises(FloatingPointError, match=r"step \d+: loss is (nan|inf)"):
        fit(config)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["loss"] is None


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_full_disk_is_one_line_and_nothing_half_written(base, tmp_path, limit):
    """The smaller limit stops config.json or metrics.jsonl, the larger the first checkpoint."""
    path = tmp_path / "run"
    process = _start(dataclasses.replace(base, path=str(path)), tmp_path, str(limit))
    out, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.strip().splitlines()[-1].startswith("error: [Errno 27]") and str(path) in err
    for file in path.glob("*.json*"):
        for line in [file.read_text()] if file.suffix == ".json" else file.read_text().split("\n"):
            json.loads(line or "null")
    assert not list(path.rglob("*tmp*"))
    if (path / "checkpoints").exists():
        assert list((path / "checkpoints").iterdir()) == []
    # Once there is room the same call goes on, here for as long as the test wants to wait.
    process = _start(dataclasses.replace(base, path=str(path)), tmp_path)
    _wait_for_step(process, path, 3)
    process.kill()
    process.communicate()
