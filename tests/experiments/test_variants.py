"""The comparison of variants: its training is `fit`'s, its numbers are right, its verdict can be no."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sinkjax.train import fit
from sinkjax.train.step import abstract_state

FOLDER = Path(__file__).parents[2] / "experiments"
LEARNED = "learned sink token"
MODULES = ("several_seeds", "step_cost", "variants")


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("variants")
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def several(experiment):
    return importlib.import_module("several_seeds")


# --- one small real run


@pytest.fixture(scope="module")
def config(experiment, tmp_path_factory):
    return experiment.Experiment(
        out=tmp_path_factory.mktemp("variants"),
        variants=(LEARNED, "softmax1"),
        tasks=("backcopy",),
        seeds=(5, 3),
        steps_backcopy=3,
        workers=1,
    )


@pytest.fixture(scope="module")
def ran(experiment, config):
    class Softmax:  # what the speed is measured beside; its program is compiled elsewhere
        def block(self, index):
            return None, 0.01

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_beside", lambda *run: Softmax())
        status = experiment.main(config)
    return status, json.loads((config.out / "summary.json").read_text())


def test_it_runs_and_says_no_after_three_steps(ran):
    status, summary = ran
    assert status == 1 and summary["claim_holds"] is False and summary["failures"] == []
    assert [one["variant"] for one in summary["results"]] == ["softmax1", LEARNED]
    for one in summary["results"]:
        assert [row["seed"] for row in one["results"]] == [5, 3]
        assert one["relative_speed"] > 0 and one["group"] in ("normalizer", "bias")
        for row in one["results"]:
            assert 3 < row["loss"] < 6 and 0.03 < row["to_bos"] < 0.2
            assert 0.01 < row["sink_mass"] < 0.3
    first, second = (row["loss"] for row in summary["results"][0]["results"])
    assert first != second
    assert summary["device"] and summary["versions"]["jax"] and summary["seconds"] > 0


def test_a_seed_trains_as_in_fit(experiment, several, ran, tmp_path, monkeypatch):
    monkeypatch.setattr("sinkjax.train.loop.make_eval_step", lambda *run: lambda *state: {})
    fields = experiment.table_of("backcopy")["softmax1"].fields
    run = several.seeded(experiment.settings("backcopy", fields, 3), 3)
    short = dataclasses.replace(run, path=str(tmp_path), log_every=1, eval_batches=1)
    losses = [one["nll"] for one in fit(short).metrics if one["split"] == "train"]
    found = ran[1]["results"][0]["results"][1]["train_loss"]
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_what_is_done_is_not_done_again(experiment, config, ran, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(experiment, "work", lambda *job: calls.append(job[1:3]))
    assert experiment.main(config) == 1 and calls == []
    assert "softmax1" in capsys.readouterr().out
    more = dataclasses.replace(config, variants=("softmax1", "sink logit"))
    experiment.main(more)
    assert calls == [("backcopy", "sink logit")]
    calls.clear()
    experiment.main(dataclasses.replace(config, seeds=(5,)))
    assert len(calls) == 2


def test_a_failure_is_told_and_the_rest_goes_on(experiment, config, ran, monkeypatch, capsys):
    def fails(*job):
        raise ValueError("no such thing")

    monkeypatch.setattr(experiment, "work", fails)
    assert experiment.main(dataclasses.replace(config, variants=("softmax1", "cog"))) == 1
    out = capsys.readouterr().out
    assert "backcopy: cog: ValueError: no such thing" in out and "softmax1" in out


def test_ctrl_c_goes_through(experiment, config, ran, monkeypatch):
    def interrupted(*job):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(dataclasses.replace(config, variants=("cog",)))


# --- rows and numbers


def test_numbers_of_uniform_attention(experiment, several):
    """A model of zeros attends alike to all it sees, and so to its learned sink token."""
    run = experiment.settings("backcopy", experiment.table_of("backcopy")[LEARNED].fields, 1)
    T, P = 32, 1
    shapes = jax.eval_shape(lambda: several._initial(run).params)
    zero = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape), leaf.dtype), shapes)
    found, _ = several.measure(run, zero)
    seen = P + 1 + np.arange(T)
    importance = (1 / seen).mean()
    np.testing.assert_allclose(found["importance"], importance, rtol=1e-5)
    np.testing.assert_allclose(found["sink_mass"], (P / seen).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["row_mass"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], math.log(66), rtol=1e-5)
    assert 1 / seen[-1] < found["to_bos"] < 1 / seen[1]
    assert found["zeros"] == found["max_activation"] == found["sink_rate_0.2"] == 0


def test_text_rows(experiment, several, tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text("".join(chr(97 + i * i % 23) for i in range(977)))
    run = experiment.settings("text", experiment.table_of("text")["meta tokens"].fields, 3)
    assert run.optimizer.weight_decay == 0.3 and run.model.num_layers == 2
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, files=(str(tmp_path),), validation_fraction=0.4)
    )
    rows = several.training_rows(several.seeded(run, 1))
    assert rows["tokens"].shape == (3, 16, 68)
    other = several.training_rows(several.seeded(run, 2))
    assert (rows["tokens"] != other["tokens"]).any()
    held_out = several.measured_rows(several.seeded(run, 1))
    assert held_out["tokens"].shape == (128, 68) and (held_out["segment_ids"] == 1).all()
    assert (held_out["tokens"][:, :5] == [257, 258, 259, 260, 256]).all()
    again = several.measured_rows(several.seeded(run, 2))
    assert (held_out["tokens"] == again["tokens"]).all()


# --- which variants, and what is said about them


def result(name, task="backcopy", group="normalizer", heads=1, **row):
    row = {"to_bos": 0.0, "loss": 3.2, "importance": 0.1, "sink_mass": 0.0} | row
    rates = {f"sink_rate_{e}{s}": 0.25 for e in (0.2, 0.3) for s in ("", "_normalized")}
    return {
        "task": task,
        "variant": name,
        "group": group,
        "relative_speed": 1.0,
        "settings": {"run": {"model": {"num_heads": heads}}},
        "results": [{"seed": seed} | rates | row for seed in (0, 1)],
    }


def test_every_variant_of_the_library_has_its_row(experiment, capsys):
    every = experiment.Experiment(groups=("normalizer", "gate", "bias", "norm"))
    names = experiment.chosen(every)
    assert set(names) == {*experiment.variants(32), "softmax, 2 heads"}
    assert len(experiment.chosen(experiment.Experiment(groups=("gate",)))) < len(names)
    table = experiment.table_of("text")
    files = {experiment.file_of(Path("x"), "text", name) for name in names}
    assert len(files) == len(names)
    rows = []
    for name in names:
        config = experiment.settings("text", table[name].fields, 7).model
        rows.append(result(name, "text", table[name].group, config.num_heads))
    console = experiment.Console(width=200)
    console.print(experiment.table(rows, "text"))
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in names)
    assert "differential ²" in shown and "softmax1 ²" not in shown
    picture = experiment.figure(rows[:3])
    assert [tick.get_text() for tick in picture.axes[0].get_yticklabels()] == names[:3]
    with pytest.raises(ValueError, match="variants: expected some of softmax, .*'softmax3'"):
        experiment.chosen(experiment.Experiment(variants=("softmax3",)))


def fine(experiment):
    found = [result("softmax", to_bos=0.9)]
    found += [result(name) for name in experiment.FREE_OF_SINKS]
    return found + [result(name, to_bos=0.5) for name in experiment.NORMALIZED]


def test_verdict(experiment):
    assert experiment.holds(fine(experiment)) == []
    assert experiment.holds(fine(experiment)[:-1])  # one was not run
    wrongs = [(0, "to_bos", 0.59), (1, "to_bos", 0.11), (2, "loss", 3.24), (3, "loss", None)]
    wrongs += [(4, "to_bos", 0.05), (3, "to_bos", float("nan"))]
    for place, entry, value in wrongs:
        doctored = fine(experiment)
        doctored[place]["results"][1][entry] = value
        if place == 4:
            doctored[place]["results"][0][entry] = value
        assert len(experiment.holds(doctored)) == 1, (place, entry)


def test_order_beside_the_paper(experiment):
    def rates(factor):
        return [
            result(name, "text", **{"sink_rate_0.2": factor * published[0] / 100})
            for name, published in experiment.PUBLISHED.items()
        ]

    agreeing, alike, _ = experiment.order(rates(0.5), "text")
    assert "softmax 0.240, rectified-only" in agreeing and "; agrees with" in agreeing
    assert "correlation 1.00" in agreeing and "nothing to compare" in alike
    opposed = experiment.order(rates(-0.5), "text")[0]
    assert "does not agree with" in opposed and "correlation -1.00" in opposed
    assert "too few" in experiment.order(rates(1)[:2], "text")[0]
    assert experiment.spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)


def test_cost_says_what_is_above_the_limit(experiment, tmp_path, monkeypatch, capsys):
    ratios = {"softmax": 1.2, "softmax1": 1.04, "sink logit": 1.06}

    def measured(name, pairs, softmax):
        assert pairs == 7
        numbers = {"low": 1.0, "high": 1.1, "quartiles": (0.9, 1.1), "milliseconds": 3.0}
        return {"variant": name, "ratio": ratios[name], **numbers}

    monkeypatch.setattr(experiment.step_cost, "measure", measured)
    monkeypatch.setattr(experiment.step_cost, "Step", lambda config: None)
    config = experiment.Experiment(out=tmp_path, cost=True, pairs=7, variants=("softmax1",))
    assert experiment.main(config) == 0
    assert "1.040" in capsys.readouterr().out
    assert experiment.main(dataclasses.replace(config, variants=tuple(ratios))) == 1
    summary = json.loads((tmp_path / "cost.json").read_text())
    assert summary["above"] == ["sink logit"] and summary["limit"] == 1.05


def test_cost_of_pairs(experiment, monkeypatch):
    """The median of ratios that alternate in their order, from steps that train."""
    cost = experiment.step_cost

    class Twice(cost.Step):
        def __init__(self, config):
            self.seconds = iter(3.0 * np.arange(1, 99)).__next__

    class Once(Twice):
        def __init__(self, config):
            self.seconds = iter(2.0 * np.arange(1, 99)).__next__

    monkeypatch.setattr(cost, "Step", Twice)
    found = cost.measure("softmax1", 20, Once(None))
    assert found["ratio"] == found["low"] == found["high"] == 1.5
    assert found["milliseconds"] == 21e3


def test_what_is_costed_is_a_training_step(experiment, monkeypatch):
    cost, steps = experiment.step_cost, []
    make = cost.make_train_step

    def traced(run, mesh):
        def step(state, batch):
            steps.append(batch["tokens"].shape)
            return jax.eval_shape(make(run, mesh), state, batch)

        return step

    monkeypatch.setattr(cost, "init_state", abstract_state)
    monkeypatch.setattr(cost, "make_train_step", traced)
    config = cost.model(experiment.variants(256)["sink logit per token"].fields)
    assert config.model_dim >= 256 and config.token_sinks
    step = cost.Step(config)
    assert step.seconds() > 0 and steps == [(4, 256)] * 3
