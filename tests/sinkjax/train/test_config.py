"""Configs survive JSON, and refuse what makes no sense."""

import dataclasses
import json

import pytest
import tyro

from sinkjax.models.presets import preset
from sinkjax.strict_json import from_json, to_json
from sinkjax.train.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    RunConfig,
    differences,
)

CONFIG = RunConfig(
    model=dataclasses.replace(preset("tiny"), windows=(None, 7), scale=0.3),
    data=DataConfig(files=("a.txt", "b"), max_bytes=1000),
    optimizer=OptimizerConfig(name="muon", clip_norm=None, no_decay=()),
    mesh=MeshConfig(data=2, model=3),
    steps=11,
)


def test_json_round_trip_is_equal_and_hashable():
    back = from_json(RunConfig, to_json(CONFIG))
    assert back == CONFIG and hash(back) == hash(CONFIG)
    assert json.loads(to_json(CONFIG))["model"]["windows"] == [None, 7]
    # A partial file takes the defaults, and an int stands for a float.
    partial = from_json(RunConfig, '{"optimizer": {"learning_rate": 1}}')
    assert partial == RunConfig(optimizer=OptimizerConfig(learning_rate=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stepz": 3}', "run: unknown keys stepz; expected some of .*steps"),
        ('{"optimizer": {"lr": 3}}', "run.optimizer: unknown keys lr; .*learning_rate"),
        ('{"data": {"files": "a"}}', "run.data.files: expected a list"),
        ('{"data": {"source": "web"}}', "run.data.source: expected one of"),
        ('{"model": {"vocab_size": 3}}', "run.model: expected the key 'model_dim'"),
    ],
)
def test_json_that_does_not_fit_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(RunConfig, text, name="run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(steps=0), "^steps: expected at least 1, got 0"),
        (lambda: RunConfig(path=""), "^path"),
        (lambda: RunConfig(seed=-1), "^seed"),
        (lambda: MeshConfig(data=0), "^mesh.data"),
        (lambda: MeshConfig(model=0), "^mesh.model"),
        (lambda: DataConfig(batch_size=0), "^data.batch_size"),
        (lambda: DataConfig(validation_fraction=1.0), "^data.validation_fraction"),
        (lambda: DataConfig(max_bytes=0), "^data.max_bytes"),
        (lambda: OptimizerConfig(learning_rate=0.0), "^optimizer.learning_rate"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "^optimizer.weight_decay"),
        (lambda: OptimizerConfig(beta2=1.0), "^optimizer.beta2"),
        (lambda: OptimizerConfig(accumulation_steps=0), "^optimizer.accumulation_steps"),
        (lambda: OptimizerConfig(rotation_block_size=0), "^optimizer.rotation_block_size"),
        (lambda: OptimizerConfig(rotation_seed=-1), "^optimizer.rotation_seed"),
        (lambda: OptimizerConfig(decay_fraction=1.5), "^optimizer.decay_fraction"),
        (lambda: OptimizerConfig(muon_embeddings=True), "^optimizer.muon_embeddings.*'adamw'"),
        (lambda: PenaltyConfig(tweo=-1.0), "^penalties.tweo: expected at least 0, got -1.0"),
        (
            lambda: RunConfig(
                model=dataclasses.replace(preset("tiny"), num_layers=1),
                penalties=PenaltyConfig(decorrelation=1.0),
            ),
            "^penalties.decorrelation: expected 0 with model.num_layers=1",
        ),
        (
            lambda: DataConfig(source="backcopy", bos="none"),
            "^data.bos: expected 'document' with source='backcopy', got 'none'",
        ),
        (
            lambda: RunConfig(
                data=DataConfig(batch_size=7), optimizer=OptimizerConfig(accumulation_steps=2)
            ),
            "^data.batch_size: expected a multiple of 2 microbatches, got 7",
        ),
    ],
)
def test_impossible_values_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_penalties_with_a_weight_are_named():
    assert PenaltyConfig().weights == {}
    assert PenaltyConfig(tweo=0.01, hidden_z_loss=1e-7).weights == {
        "hidden_z_loss": 1e-7,
        "tweo": 0.01,
    }


def test_differences_are_dotted_names_with_both_values():
    other = dataclasses.replace(
        CONFIG, steps=12, optimizer=dataclasses.replace(CONFIG.optimizer, beta1=0.5)
    )
    assert differences(CONFIG, other) == [("optimizer.beta1", 0.9, 0.5), ("steps", 11, 12)]
    assert differences(CONFIG, CONFIG) == []


def test_the_dataclasses_are_a_command_line():
    arguments = ["--steps", "7", "--data.files", "a", "b", "--optimizer.clip-norm", "None"]
    config = tyro.cli(RunConfig, args=[*arguments, "--model.windows", "None", "5"])
    assert config == RunConfig(
        model=dataclasses.replace(preset("tiny"), windows=(None, 5)),
        data=DataConfig(files=("a", "b")),
        optimizer=OptimizerConfig(clip_norm=None),
        steps=7,
    )
