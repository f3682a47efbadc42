"""The launch scripts parse, and hand their words on unbroken, to stand-ins of what they call."""

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "launch"
SCRIPTS = sorted(FOLDER.iterdir())
WORDS = ["--steps", "7", "--variant", "gate, head-wise"]


def test_there_is_one_for_each_kind_of_cluster():
    assert [path.name for path in SCRIPTS] == ["gke_xpk.sh", "slurm.sbatch", "tpu_vm.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_words_arrive_at_sinkjax_train(path, tmp_path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    # What stands for gcloud and xpk runs the value of --command, srun what follows its flags.
    remote = (
        "while [[ $1 != --command* ]]; do shift; done; c=${1#--command=}; [[ $c = $1 ]] && c=$2\n"
    )
    tools = {
        "gcloud": f'{remote}bash -c "$c"',
        "xpk": f'{remote}bash -c "$c"',
        "srun": 'shift; "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
        "python3": f'printf "%s\\n" "$@" > {tmp_path}/words',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    names = "NAME ZONE CLUSTER PROJECT IMAGE STORAGE USER SLURM_JOB_ID".split()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": f"{tmp_path}/a run"}
    environment |= dict.fromkeys(names, "x")
    for folder in ("", "a run"):
        (tmp_path / folder).mkdir(exist_ok=True)
        done = subprocess.run(["bash", str(path), *WORDS], env=environment)
        # On GKE only a status says that the pods must start again.
        assert (done.returncode == 0) == (path.stem != "gke_xpk" or bool(folder))
        said = (tmp_path / "words").read_text().splitlines()
        start = ["-m", "sinkjax.cli", "train", "--out", environment["OUT"]]
        assert said == [*start, "--distributed.mode", "auto", *WORDS]
        # A Slurm job that leaves no record of a finished run queues again.
        requeued = (tmp_path / "requeued").exists()
        assert requeued == (path.suffix == ".sbatch" and not folder)
        (tmp_path / "requeued").unlink(missing_ok=True)
        (tmp_path / "a run").mkdir(exist_ok=True)
        (tmp_path / "a run" / "summary.json").write_text("{}")
