"""Checkpoints hold what they were given, newest N of them, or nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import parameters
from sinkjax.models.storage import load
from sinkjax.sharding import make_mesh
from sinkjax.strict_json import to_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import DataConfig, OptimizerConfig, RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.step import abstract_state, init_state
from sinkjax.train.tasks import Backcopy

MODEL = DecoderConfig(
    vocab_size=65,
    model_dim=22,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=17,
    context_length=13,
)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(source="backcopy", batch_size=6),
    optimizer=OptimizerConfig(name="muon"),
)


@pytest.fixture(scope="module")
def state():
    return init_state(CONFIG, make_mesh(1, 1))


def _iterator():
    return iterate(batches(Backcopy(13), 6, seed=0))


def _plain(state):
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return jax.tree.map(np.array, state)


def test_round_trip_of_a_donated_state_and_of_the_iterator(tmp_path, state):
    # The writing goes on in the background while the next step overwrites the buffers it donated.
    scramble = jax.jit(
        lambda s: dataclasses.replace(
            s, params=jax.tree.map(lambda x: x * 3 + 1, s.params), step=s.step + 1
        ),
        donate_argnums=0,
    )
    moving = jax.tree.map(jnp.copy, state)
    walk, saved = _iterator(), {}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest is None
        for _ in range(5):
            next(walk)
            moving = scramble(moving)
            saved[int(moving.step)] = _plain(moving)
            checkpoints.save(moving, walk)
        moving = scramble(scramble(moving))
        checkpoints.wait()
        assert checkpoints.latest == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    abstract = abstract_state(CONFIG, make_mesh(1, 1))
    for step in (4, 5):
        fresh = _iterator()
        with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
            back = checkpoints.restore(step, abstract, fresh, MODEL)
        jax.tree.map(np.testing.assert_array_equal, _plain(back), saved[step])
        assert jax.tree.structure(back) == jax.tree.structure(state)
        assert fresh.get_state() == {"next_index": step}
    # The models room reads the run folder without knowing the optimiser.
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    model, config = load(tmp_path)
    assert config == MODEL
    jax.tree.map(np.testing.assert_array_equal, parameters(model), saved[5].params)


def test_leftovers_of_a_killed_process_are_removed(tmp_path, state):
    torn = tmp_path / "7.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "half").write_text("written")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(state, _iterator())
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_another_shape_names_the_first_parameter_that_differs(tmp_path, state):
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, mlp_dim=19))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, _iterator())
        checkpoints.wait()
        abstract = abstract_state(wide, make_mesh(1, 1))
        with pytest.raises(ValueError, match=r"blocks/0/mlp/\w+/kernel: expected .*19.* got .*17"):
            checkpoints.restore(0, abstract, _iterator(), wide.model)
