"""Several processes train as one would, end together, and go on in any number."""

import resource
import shutil
import signal
import time

import pytest


@pytest.fixture
def equals(unbroken):
    """Losses are those of one process, but for the order in which sums are taken."""

    def check(hosts):
        found = hosts.values()
        assert found.keys() == unbroken.keys()
        for key, value in found.items():
            assert value == pytest.approx(unbroken[key], rel=1e-5), key

    return check


def slurm(process):
    """What `srun` tells a process; jax derives the port from the job."""
    return {
        "SLURM_JOB_ID": str(slurm.job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


@pytest.mark.parametrize(
    ("count", "devices", "words"),
    [
        (4, 1, "--mesh.model 2"),  # two hold the same rows
        (2, 2, "--mesh.sequence 2"),
    ],
)
def test_losses_are_those_of_one_process(start, equals, tmp_path, count, devices, words):
    hosts = start(tmp_path / "run", words, count, devices).well()
    equals(hosts)
    assert (tmp_path / "run" / "summary.json").exists()


def test_slurm_is_found(start, equals, tmp_path):
    slurm.job = time.time_ns() // 1_000_000  # hence another port every time
    words = "--distributed.mode auto --mesh.model 2"  # both hold all rows
    equals(start(tmp_path / "run", words, cluster=slurm).well())


GO_ON = "the same command goes on from the last checkpoint"


def test_a_lost_process_is_named_by_the_others_and_the_run_goes_on_in_any_number(
    start, equals, tmp_path
):
    hosts = start(tmp_path / "run")
    hosts.reach(50)
    hosts.processes[1].kill()
    lost = time.monotonic()
    [first, second], said = hosts.end()
    assert time.monotonic() - lost < 60 and (first, second) == (1, -signal.SIGKILL), said
    assert f"process 0 of 2 stops: process 1 was not heard of for 20 s; {GO_ON}" in said[0]
    assert f"process 1 of 2 was killed, ran out of memory or crashed; {GO_ON}" in said[1]
    # What was being written when they stopped is left for the next start to remove.
    names = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert 20 <= max(int(name) for name in names if name.isdigit()) < 120
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        shutil.copytree(tmp_path / "run", out)
        equals(start(out, count=count).well())


def test_without_process_0_the_others_stop_at_once(start, tmp_path):
    hosts = start(tmp_path / "run", "--distributed.heartbeat-timeout-seconds 3600")
    hosts.reach(30)
    hosts.processes[0].kill()
    lost = time.monotonic()
    status, said = hosts.end()
    assert time.monotonic() - lost < 60 and status[0] == -signal.SIGKILL and 0 not in status, said
    words = "sinkjax: process 1 of 2 stops: process 0, to which all others report, has ended or "
    assert said[1].splitlines()[-1].startswith(words) and GO_ON in said[1]


def test_a_signal_to_one_process_saves_and_stops_all_after_the_same_step(start, equals, tmp_path):
    out = tmp_path / "run"
    hosts = start(out, "--checkpoint-every 1000")
    hosts.reach(5)
    hosts.processes[1].send_signal(signal.SIGTERM)
    status, said = hosts.end()
    assert status == [0, 0], said
    [step] = [int(path.name) for path in (out / "checkpoints").iterdir()]
    assert 5 <= step < 120
    assert f"sinkjax train: stopped by SIGTERM at step {step}; saved; go on with: " in said[0]
    # Ctrl-C is passed on in the same way, and both at once are one.
    hosts = start(out, "--checkpoint-every 1000")
    hosts.reach(step + 2)
    hosts.processes[1].send_signal(signal.SIGINT)
    status, said = hosts.end()
    assert status == [0, 130], said
    assert "sinkjax train: interrupted; go on with: sinkjax train" in said[1]
    assert not (out / "summary.json").exists()
    hosts = start(out, "--checkpoint-every 1000")
    hosts.reach(max(step for step, _ in hosts.values()) + 2)
    for process in hosts.processes:
        process.send_signal(signal.SIGTERM)
    assert hosts.end()[0] == [0, 0]
    equals(start(out, "--checkpoint-every 1000", count=1).well())


def test_what_fails_on_one_process_ends_all_and_all_say_it(start, tmp_path):
    none = tmp_path / "none.txt"
    began = time.monotonic()
    status, said = start(tmp_path / "run", own={1: f"--data.files {none}"}).end()
    assert time.monotonic() - began < 60 and status == [1, 2], said
    message = f"data.files: expected text files, '{none}' names none"
    assert f"process 0 of 2 stops: process 1 failed (ValueError: {message}" in said[0]
    assert said[1].splitlines()[-1].startswith(f"sinkjax train: error: {message}")
    # In the middle, where the others wait for it in a sum over all.
    hosts = start(tmp_path / "run")
    hosts.reach(30)
    log = tmp_path / "run" / "metrics.jsonl"
    resource.prlimit(hosts.processes[0].pid, resource.RLIMIT_FSIZE, (log.stat().st_size,) * 2)
    status, said = hosts.end()
    assert status == [2, 1], said
    assert f"sinkjax train: error: File too large: {log}" in said[0]
    assert "process 1 of 2 stops: process 0 failed (OSError: [Errno 27] File too large" in said[1]


def test_processes_that_want_different_runs_do_not_start_one(start, tmp_path):
    for words, name in (("--seed 7", "seed"), ("--checkpoint-every 7", "checkpoint_every")):
        status, said = start(tmp_path / name, own={1: words}).end()
        assert status == [1, 2], said
        assert f"{name}: expected what process 0 has, " in said[1]
        assert ", got 7 in process 1" in said[1]
        assert not (tmp_path / name / "metrics.jsonl").exists()


def test_a_folder_of_which_each_has_its_own_is_refused(start, tmp_path):
    """After a minute: a disk in a network may take some time to show what was written."""
    status, said = start(tmp_path / "run", own={1: f"--out {tmp_path / 'other'}"}).end()
    assert status == [1, 2], said
    message = (
        f"path: expected a folder that all processes share, got {tmp_path / 'other'}, in which"
    )
    assert (
        said[1].splitlines()[-1].startswith(f"sinkjax train: error: {message} process 1 does not")
    )
    assert f"process 0 of 2 stops: process 1 failed (ValueError: {message}" in said[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_those_who_wait_in_vain_say_for_whom(start, tmp_path):
    hosts = start(tmp_path / "run", "--distributed.connect-timeout-seconds 3", count=2)
    hosts.processes[1].kill()
    status, said = hosts.end()
    assert status[0] not in (0, -signal.SIGKILL)
    words = (
        "sinkjax: the processes did not all come together within 3 s: 2 are expected at 127.0.0.1:"
    )
    assert said[0].splitlines()[-1].startswith(words)
    [status], [said] = start(tmp_path / "run", "--distributed.mode auto", count=1).end()
    assert (
        status == 2 and "expected a process of Cloud TPU, GKE, Slurm or Open MPI with 'au" in said
    )
