"""Published settings: they say what their sources say, and fit the configs."""

import dataclasses

import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.strict_json import from_json, to_json
from sinkjax.train.config import OptimizerConfig, RunConfig
from sinkjax.train.presets import (
    GU_LEARNING_RATES,
    GU_WEIGHT_DECAYS,
    PRESETS,
    train_preset,
)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_run_that_survives_json(name):
    run = RunConfig(optimizer=OptimizerConfig(accumulation_steps=4, learning_rate=0.5))
    changed = train_preset(name).apply(run)
    assert from_json(RunConfig, to_json(changed)) == changed
    assert changed.optimizer.accumulation_steps == 4 and changed.optimizer.learning_rate < 0.1
    assert changed.data == run.data and changed.steps == run.steps
    fields = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert set(PRESETS[name].model) <= fields
    assert "arXiv" in PRESETS[name].source or "github" in PRESETS[name].source


def test_the_emergence_study():
    base = train_preset("gu")
    assert base.optimizer == OptimizerConfig(
        learning_rate=4e-4, schedule="constant", warmup_steps=100, weight_decay=0.1
    )
    assert base == train_preset("gu, weight decay 0.1")
    assert base == train_preset("gu, learning rate 0.0004, 20000 steps")
    decays = [train_preset(f"gu, weight decay {decay:g}") for decay, _, _ in GU_WEIGHT_DECAYS]
    assert [p.optimizer.weight_decay for p in decays] == [0, 0.001, 0.01, 0.1, 0.5, 1, 2, 5]
    # Not monotonic: the strongest sink is at 0.5.
    assert max(decays, key=lambda p: p.published["sink_rate"]).optimizer.weight_decay == 0.5
    assert len(GU_LEARNING_RATES) == sum(name.startswith("gu, learning") for name in PRESETS)
    assert train_preset("gu, learning rate 0.0001, 80000 steps").steps == 80_000


def test_outlier_safe_rows():
    rows = {name: preset for name, preset in PRESETS.items() if name.startswith("osp")}
    assert len(rows) == 6
    order = sorted(rows, key=lambda name: rows[name].published["kurtosis"])
    assert order[0] == "osp" and order[-1] == "osp, adam"
    assert rows["osp"].model == {"norm": "single_scale", "embedding_projection": True}
    # The final model has AdamW on its tables; one row of the ablation has it nowhere.
    everywhere = [name for name, row in rows.items() if row.optimizer.muon_embeddings]
    assert everywhere == ["osp, muon without adam"]
    assert {row.optimizer.name for row in rows.values()} == {"adamw", "muon"}


def test_an_unknown_preset_lists_the_choices():
    with pytest.raises(ValueError, match="recipe: expected one of gu, .*kaul.*; got 'guu'"):
        train_preset("guu")
