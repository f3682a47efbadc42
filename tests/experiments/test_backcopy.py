"""The experiment runs as its docstring says, and its verdict is not always yes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "experiments" / "backcopy.py"


@pytest.fixture(scope="module")
def backcopy():
    spec = importlib.util.spec_from_file_location("experiment_backcopy", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows(softmax=0.9, free=0.0, loss=3.2, seed=0):
    four = ("softmax", "softmax1", "sink logit", "sigmoid, bias -ln T")
    found = [
        {"variant": name, "seed": seed, "attention_to_bos": free, "loss": 3.2} for name in four
    ]
    found[0] |= {"attention_to_bos": softmax, "loss": loss}
    return found


def test_verdict(backcopy):
    assert backcopy.holds(rows())
    assert backcopy.holds(rows(softmax=0.6, free=0.1, loss=3.229))
    assert not backcopy.holds(rows(softmax=0.59))
    assert not backcopy.holds(rows(free=0.11))
    assert not backcopy.holds(rows(loss=3.24))
    assert not backcopy.holds(rows()[:3])  # one of the four was not run
    assert not backcopy.holds([*rows(), *rows(softmax=0.2, seed=1)])


def test_it_runs_and_says_no_after_three_steps(backcopy, tmp_path, capsys):
    config = backcopy.Experiment(out=tmp_path, seeds=(5,), variants=("softmax1",), steps=3)
    assert backcopy.main(config) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["claim_holds"] is False
    (row,) = summary["results"]
    assert (row["variant"], row["seed"]) == ("softmax1", 5)
    assert 0 < row["attention_to_bos"] < 0.3 and 0 < row["row_mass"] < 1
    assert f"{row['loss']:.3f}" in capsys.readouterr().out
