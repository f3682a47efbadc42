"""Configs through JSON, models out of run folders, and what is refused."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.checksums import write_checksums
from sinkjax.models import (
    PRESETS,
    Decoder,
    config_from_json,
    config_to_json,
    load,
    parameters,
    preset,
)

CONFIG = dataclasses.replace(
    preset("tiny"), num_layers=4, windows=(5, None), scan_layers=True, sinks=True
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, with checkpoints of seeds 9 and 10 at these steps."""
    from orbax.checkpoint import v1 as ocp

    folder = tmp_path_factory.mktemp("run")
    text = {"model": dataclasses.asdict(CONFIG), "steps": 10}
    (folder / "config.json").write_text(json.dumps(text))
    with ocp.training.Checkpointer(folder / "checkpoints") as checkpointer:
        for step in (9, 10):
            params = parameters(Decoder(CONFIG, rngs=nnx.Rngs(step)))
            checkpointer.save_checkpointables(step, {"params": params, "train": {"opt": params}})
            write_checksums(folder / "checkpoints" / str(step), ["params", "train"])
    (folder / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    return folder


def with_model(run, tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    return tmp_path


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = PRESETS[name]
    assert config_from_json(config_to_json(config)) == config
    assert config_from_json(json.loads(config_to_json(config))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(wide=1, deep=2), "config: unknown keys deep, wide; expected some of normalizer"),
        (dict(model_dim="64"), "config.model_dim: expected int, got '64'"),
        (dict(sinks=1), "config.sinks: expected bool, got 1"),
        (dict(windows=[3, "x"]), r"config.windows\[1\]: expected int or NoneType, got 'x'"),
        (dict(windows=5), "config.windows: expected a list, got 5"),
        (
            dict(gate="wide"),
            "config.gate: expected one of none, elementwise, headwise, .*; got 'wide'",
        ),
        (dict(num_kv_heads=3), "num_heads: expected a multiple"),
    ],
)
def test_bad_json_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config_from_json(dataclasses.asdict(CONFIG) | change)


def test_json_that_is_none():
    with pytest.raises(ValueError, match="here.json: expected JSON, got"):
        config_from_json("{", name="here.json")
    with pytest.raises(ValueError, match="config: expected a JSON object, got list"):
        config_from_json("[]")
    with pytest.raises(ValueError, match="config: expected the key 'model_dim', got vocab_size"):
        config_from_json({"vocab_size": 3})
    assert config_from_json(dataclasses.asdict(CONFIG) | {"rope_theta": 7}).rope_theta == 7.0


@pytest.mark.parametrize(("step", "seed"), [(None, 10), (9, 9)])
def test_load(run, step, seed):
    model, config = load(run, step=step)
    assert config == CONFIG == model.config
    want = parameters(Decoder(CONFIG, rngs=nnx.Rngs(seed)))
    got = parameters(model)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert model(jnp.arange(7)[None]).logits.shape == (1, 7, 257)


def test_a_damaged_checkpoint_is_named_and_left_out(run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    payload = _largest(folder / "checkpoints" / "10" / "params")
    _flip(payload)  # orbax itself would load it without a word
    model, _ = load(folder)
    want = parameters(Decoder(CONFIG, rngs=nnx.Rngs(9)))
    jax.tree.map(np.testing.assert_array_equal, parameters(model), want)
    [record] = caplog.records
    words = f"checkpoints/10 is damaged and left out: params/.*{payload.name}: expected CRC-32"
    assert re.search(words, record.getMessage())
    with pytest.raises(ValueError, match="a checkpoint that is whole, got 10/params/.*CRC-32"):
        load(folder, step=10)
    # The optimiser is not read, so its damage does not matter here.
    _flip(_largest(folder / "checkpoints" / "9" / "train"))
    load(folder, step=9)
    (folder / "checkpoints" / "9" / "checksums.json").unlink()
    with pytest.raises(
        ValueError, match="whole, got 10/params/.*; 9/checksums.json.*: No such file"
    ):
        load(folder)


def _largest(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def test_load_in_another_type_and_on_a_mesh(run, tmp_path):
    from sinkjax.sharding import make_mesh

    folder = with_model(run, tmp_path, dataclasses.asdict(CONFIG) | {"param_dtype": "bfloat16"})
    mesh = make_mesh()
    model, _ = load(folder, mesh=mesh)
    assert model.embedding.embedding[...].dtype == jnp.bfloat16
    place = model.embedding.embedding[...].sharding
    assert isinstance(place, jax.sharding.NamedSharding) and place.mesh == mesh


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mlp_dim=37), r"10: parameter blocks/0/mlp/down/kernel: expected \(2, 37, 64\), got"),
        (dict(sinks=False), r"blocks/0/attention/sinks: expected no such parameter, got \(2, 1\)"),
        (dict(wide=3), "config.json: model: unknown keys wide"),
    ],
)
def test_checkpoint_of_another_shape_is_refused(run, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        load(with_model(run, tmp_path, dataclasses.asdict(CONFIG) | change))


def test_missing_things_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="path: expected a run folder, got .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path: expected a run folder with a config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: expected the model's config under the key"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(CONFIG)}))
    with pytest.raises(ValueError, match="path: expected a checkpoint in .*checkpoints, got none"):
        load(tmp_path)
    with pytest.raises(ValueError, match="step: expected one of 9, 10; got 11"):
        load(run, step=11)


def test_models_import_nothing_heavy():
    code = (
        "import sys, sinkjax.models; "
        "print([m for m in ('orbax', 'matplotlib', 'grain', 'tyro') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
