"""A checkpoint knows no mesh: saved on one, it goes on on any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import parameters
from sinkjax.models.storage import load
from sinkjax.sharding import batch_sharding, make_mesh
from sinkjax.strict_json import to_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import DataConfig, OptimizerConfig, RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.step import abstract_state, init_state, make_train_step
from sinkjax.train.tasks import Backcopy

CONFIG = RunConfig(
    model=DecoderConfig(
        vocab_size=67,
        model_dim=24,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=40,
        context_length=14,
        sinks=True,
        scan_layers=True,
    ),
    data=DataConfig(source="backcopy", batch_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    steps=6,
    log_every=1,
    eval_batches=1,
)

# The experts' kernels are cut by an axis of their own.
MIXTURE = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, num_experts=6, scan_layers=False)
)

ONE = dict(data=1)
FULLY_SHARDED = dict(data=8)
TENSOR = dict(data=1, model=8)
MIXED = dict(data=2, model=2)
EXPERT = dict(data=2, expert=2, model=2)
SEQUENCE = dict(data=2, sequence=2)
EXPLICIT = dict(explicit=True)


def _iterator():
    return iterate(batches(Backcopy(14), 16, seed=0))


def _plain(state):
    return jax.tree.map(np.array, dataclasses.replace(state, key=jax.random.key_data(state.key)))


def _assert_same(found, wanted):
    def compare(a, b):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()

    jax.tree.map(compare, _plain(found), wanted)


@pytest.mark.parametrize(
    ("config", "route"),
    [
        # 1 -> 8 -> 4 devices, and from automatic to explicit axes.
        (CONFIG, [ONE, FULLY_SHARDED, MIXED | EXPLICIT]),
        pytest.param(
            MIXTURE,
            [TENSOR, EXPERT, FULLY_SHARDED | EXPLICIT, SEQUENCE, TENSOR | EXPLICIT, MIXED, ONE],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_from_mesh_to_mesh_every_bit_stays(tmp_path, config, route):
    meshes = [make_mesh(**sizes) for sizes in route]
    abstract = abstract_state(config, meshes[0])
    # No two numbers alike, in the moments too: what lands in another place shows.
    random = np.random.default_rng(3)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(5)
        values = random.integers(1, 1 << 30, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values * np.asarray(1.7, leaf.dtype), leaf.sharding)

    state = dataclasses.replace(jax.tree.map(fill, abstract), step=jnp.int32(0))
    wanted, walk = _plain(state), _iterator()
    for _ in range(3):
        next(walk)
    for step, mesh in enumerate(meshes[1:], start=1):
        with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), walk)
            checkpoints.wait()
            walk, abstract = _iterator(), abstract_state(config, mesh)
            state, found = checkpoints.restore_newest(abstract, walk, config.model)
        assert found == step and walk.get_state() == {"next_index": 3}
        _assert_same(state, dataclasses.replace(wanted, step=np.array(step, np.int32)))
        # An array that lies somewhere else than the step expects would be moved at every step.
        jax.tree.map(lambda a, b: _placed(a, b.sharding), state, abstract)
    assert found == len(route) - 1
    (tmp_path / "config.json").write_text(to_json(config))
    model, _ = load(tmp_path, mesh=make_mesh(**MIXED))
    jax.tree.map(np.testing.assert_array_equal, parameters(model), wanted.params)


def _placed(array, sharding):
    assert array.sharding == sharding, f"expected {sharding}, got {array.sharding}"


def _train(folder, legs):
    """Losses of steps made on one mesh after the other, each from a checkpoint of the last."""
    losses = []
    for sizes, steps in legs:
        mesh, walk = make_mesh(**sizes), _iterator()
        with Checkpoints(folder, keep=2) as checkpoints, jax.set_mesh(mesh):
            found = checkpoints.restore_newest(abstract_state(CONFIG, mesh), walk, CONFIG.model)
            state, start = found or (init_state(CONFIG, mesh), 0)
            assert start == len(losses) == walk.get_state()["next_index"]
            step = make_train_step(CONFIG, mesh)
            for _ in range(steps):
                batch = jax.device_put(next(walk), batch_sharding(mesh))
                state, metrics = step(state, batch)
                losses.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
            checkpoints.save(state, walk)
    return losses


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("unbroken"), [(ONE, 6)])


@pytest.mark.slow
def test_a_run_goes_on_on_more_and_on_fewer_devices(tmp_path, unbroken):
    losses = _train(tmp_path, [(ONE, 2), (FULLY_SHARDED, 2), (MIXED, 2)])
    np.testing.assert_allclose(losses, unbroken, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_from_tensor_parallel_to_fully_sharded(tmp_path, unbroken):
    route = [TENSOR, EXPERT, SEQUENCE, FULLY_SHARDED, MIXED | EXPLICIT, ONE]
    legs = [(sizes, 1) for sizes in route]
    np.testing.assert_allclose(_train(tmp_path, legs), unbroken, rtol=1e-5)
