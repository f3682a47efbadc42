"""A sharded training step is the step of one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.sharding import batch_sharding, make_mesh
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    RunConfig,
)
from sinkjax.train.data import batches, iterate
from sinkjax.train.loop import fit
from sinkjax.train.step import abstract_state, init_state, make_eval_step, make_train_step
from sinkjax.train.tasks import Backcopy

CONFIG = RunConfig(
    model=DecoderConfig(
        vocab_size=68,
        model_dim=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=34,
        context_length=14,
        sinks=True,
        scan_layers=True,
    ),
    data=DataConfig(source="backcopy", batch_size=12),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    steps=7,
    log_every=1,
    eval_batches=1,
)


def _losses(config, mesh):
    losses = []
    batch = jax.device_put(Backcopy(14, seed=1).rows(np.arange(12)), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        first = jax.tree.map(np.array, state.params)
        step = make_train_step(config, mesh).lower(state, batch).compile()
        for n in range(5):
            batch = Backcopy(14, seed=1).rows(np.arange(12 * n, 12 * n + 12))
            batch = jax.device_put(batch, batch_sharding(mesh))
            state, metrics = step(state, batch)
            losses.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
        found = make_eval_step(config, mesh)(state.params, batch)
    return first, losses, jax.tree.map(np.asarray, found), state, step


@pytest.fixture(scope="module")
def alone():
    return _losses(CONFIG, make_mesh(1, 1))


def _config(optimizer=None, model=None, penalties=None):
    return dataclasses.replace(
        CONFIG,
        optimizer=dataclasses.replace(CONFIG.optimizer, **optimizer or {}),
        model=dataclasses.replace(CONFIG.model, **model or {}),
        penalties=PenaltyConfig(**penalties or {}),
    )


def _same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), got[0], want[0])
    (loss, norm), (expected, expected_norm) = np.transpose(got[1]), np.transpose(want[1])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-4)  # Adam makes much of rounding
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got[2], want[2]
    )


@pytest.mark.parametrize(
    ("axes", "explicit", "optimizer"),
    [
        (dict(data=4, model=2), False, {}),
        (dict(data=2, model=2), False, dict(accumulation_steps=3)),
        (dict(data=4, model=2), True, dict(loss_chunks=3)),
        pytest.param(
            dict(data=2, model=2), True, dict(accumulation_steps=3), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(data=2, sequence=2, model=2), False, dict(loss_chunks=3), marks=pytest.mark.slow
        ),
        pytest.param(dict(data=2, sequence=2, model=2), True, {}, marks=pytest.mark.slow),
        pytest.param(dict(data=2, expert=2, model=2), True, {}, marks=pytest.mark.slow),
    ],
)
def test_sharded_steps_equal_those_of_one_device(alone, axes, explicit, optimizer):
    config, mesh = _config(optimizer), make_mesh(**axes, explicit=explicit)
    got = _losses(config, mesh)
    _same(got, alone)
    state, step = got[3:]
    # Parameters and moments really are cut, the stacked layer axis is not.
    query = state.params["blocks"][0]["attention"]["query"]["kernel"]
    gathered = mesh.size // axes["model"]
    assert query.shape == (2, 24, 6, 10)
    shard = (2, 24 // gathered, 6 // axes["model"], 10)
    assert query.addressable_shards[0].data.shape == shard
    cut = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == query.shape]
    assert len(cut) == 2 and all(leaf.sharding == query.sharding for leaf in cut)
    # The new state lies where the old one did, and each device holds its share alone.
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves((state.params, state.opt_state, state.step))
    )
    assert step.memory_analysis().alias_size_in_bytes >= held
    # Nothing gathers the tokens of the batch, in whatever parts they are gone through.
    if "sequence" not in axes:
        local = config.data.batch_size // (axes["data"] * axes.get("expert", 1))
        local //= config.optimizer.accumulation_steps
        whole = re.findall(r"f32\[(\d+),14,24\]", str(step.as_text()))
        assert whole and max(map(int, whole)) <= local


@pytest.mark.slow
@pytest.mark.parametrize(
    ("explicit", "model"),
    [
        (True, dict(remat="full")),
        (True, dict(remat="attention", scan_layers=False)),
        (False, dict(remat="dots", windows=(5, None), num_sink_tokens=2)),
        (True, dict(vocab_size=67, gate="headwise", qk_norm=True)),  # 67 does not divide
        (True, dict(tied_head=True, norm_placement="sandwich")),
    ],
)
def test_variants_train_on_a_mesh(explicit, model):
    config = _config(
        dict(accumulation_steps=3), model, dict(hidden_z_loss=0.01, tweo=0.1, decorrelation=0.1)
    )
    mesh = make_mesh(2, 2, explicit=explicit)
    _same(_losses(config, mesh), _losses(config, make_mesh()))


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    many, one = make_mesh(4, 2), make_mesh(1, 1)
    state = init_state(CONFIG, many)
    walk = iterate(batches(Backcopy(14), 12, seed=0))
    next(walk)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, walk)
        checkpoints.wait()
        for mesh in (one, make_mesh(2, 1)):
            fresh = iterate(batches(Backcopy(14), 12, seed=0))
            back = checkpoints.restore(0, abstract_state(CONFIG, mesh), fresh, CONFIG.model)
            jax.tree.map(np.testing.assert_array_equal, back.params, state.params)
            assert back.params["head"]["kernel"].sharding.mesh == mesh
            assert fresh.get_state() == {"next_index": 1}


def test_a_run_goes_on_on_another_mesh_with_the_same_losses(tmp_path):
    config = dataclasses.replace(
        CONFIG, path=str(tmp_path / "run"), mesh=MeshConfig(4, 2), checkpoint_every=3
    )
    whole = fit(config)
    for step in ("6", "7"):  # as if it had been killed after step 3
        (tmp_path / "run" / "checkpoints" / step).rename(tmp_path / step)
    rest = fit(dataclasses.replace(config, mesh=MeshConfig(1, 1)))
    losses = [[r["loss"] for r in run.metrics if r["split"] == "train"] for run in (whole, rest)]
    assert len(losses[0]) == 7
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, path=str(tmp_path / "run"), mesh=MeshConfig(8, 1))
    with pytest.raises(ValueError, match="data.batch_size: expected .* multiple of 8 rows.*got 12"):
        fit(config)
    assert not (tmp_path / "run").exists()
