"""A sharded training step is the step of one device."""

import dataclasses

import jax
import numpy as np
import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.sharding import make_mesh
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.loop import fit
from sinkjax.train.step import abstract_state, init_state, make_eval_step, make_train_step
from sinkjax.train.tasks import Backcopy

CONFIG = RunConfig(
    model=DecoderConfig(
        vocab_size=67,
        model_dim=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=34,
        context_length=13,
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
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    first = jax.tree.map(np.asarray, state.params)
    losses = []
    batch = Backcopy(13, seed=1).rows(np.arange(12))
    with jax.set_mesh(mesh):
        for n in range(5):
            batch = Backcopy(13, seed=1).rows(np.arange(12 * n, 12 * n + 12))
            state, metrics = step(state, batch)
            losses.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
        found = make_eval_step(config, mesh)(state.params, batch)
    return first, losses, jax.tree.map(np.asarray, found), state


@pytest.fixture(scope="module")
def alone():
    return _losses(CONFIG, make_mesh(1, 1))


@pytest.mark.parametrize(("data", "model", "parts"), [(4, 2, 1), (2, 2, 3)])
def test_sharded_steps_equal_those_of_one_device(alone, data, model, parts):
    optimizer = dataclasses.replace(CONFIG.optimizer, accumulation_steps=parts)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    first, losses, found, state = _losses(config, make_mesh(data, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), first, alone[0])
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, alone[2]
    )
    # Parameters and moments really are cut, the stacked layer axis is not.
    query = state.params["blocks"][0]["attention"]["query"]["kernel"]
    assert query.shape == (2, 24, 6, 10)
    assert query.addressable_shards[0].data.shape == (2, 24 // data, 6 // model, 10)
    cut = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == query.shape]
    assert len(cut) == 2 and all(leaf.sharding == query.sharding for leaf in cut)


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    many, one = make_mesh(4, 2), make_mesh(1, 1)
    state = init_state(CONFIG, many)
    walk = iterate(batches(Backcopy(13), 12, seed=0))
    next(walk)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, walk)
        checkpoints.wait()
        for mesh in (one, make_mesh(2, 1)):
            fresh = iterate(batches(Backcopy(13), 12, seed=0))
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
