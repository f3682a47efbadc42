"""The jitted steps: right loss, right sums, one compilation."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import from_parameters
from sinkjax.models.presets import preset
from sinkjax.ops.losses import token_nll
from sinkjax.sharding import make_mesh
from sinkjax.train.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    PenaltyConfig,
    RunConfig,
)
from sinkjax.train.step import (
    abstract_state,
    init_state,
    loss_chunks,
    make_eval_step,
    make_train_step,
)
from sinkjax.train.tasks import Backcopy

CONFIG = RunConfig(
    model=DecoderConfig(
        vocab_size=65,
        model_dim=22,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=10,
        mlp_dim=17,
        context_length=13,
        sinks=True,
    ),
    data=DataConfig(source="backcopy", batch_size=6),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
    steps=40,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1)


def _batch(n, mask=True):
    batch = Backcopy(13, seed=1).rows(np.arange(6 * n, 6 * n + 6))
    if mask:  # rows of different weight, so that a mean of means would be wrong
        batch["loss_mask"] = (np.arange(13) < np.asarray([13, 3, 7, 1, 11, 5])[:, None]) * np.int32(
            1
        )
    return batch


def test_loss_is_the_masked_mean_and_falls(mesh):
    state = init_state(CONFIG, mesh)
    model = from_parameters(CONFIG.model, jax.tree.map(jnp.copy, state.params))
    batch = _batch(0)
    expected = token_nll(model(jnp.asarray(batch["tokens"])).logits, jnp.asarray(batch["targets"]))
    expected = np.asarray(expected)[batch["loss_mask"] == 1].mean()
    step = make_train_step(CONFIG, mesh)
    losses, key = [], np.array(jax.random.key_data(state.key))
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["nll"]))
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 40
    np.testing.assert_array_equal(jax.random.key_data(state.key), key)
    assert float(metrics["learning_rate"]) == pytest.approx(1e-3, rel=0.05)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


PENALTIES = PenaltyConfig(hidden_z_loss=0.01, tweo=30.0, decorrelation=0.5)
WHOLE = dataclasses.replace(
    CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, z_loss=1e-2), penalties=PENALTIES
)


@pytest.fixture(scope="module")
def whole(mesh):
    """One step with every part of the loss, in one piece."""
    batch = _padded(_batch(0))
    state, metrics = make_train_step(WHOLE, mesh)(init_state(WHOLE, mesh), batch)
    return state.opt_state, metrics


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_changes_nothing_but_memory(mesh, whole, parts):
    optimizer = dataclasses.replace(WHOLE.optimizer, accumulation_steps=parts)
    config = dataclasses.replace(WHOLE, optimizer=optimizer)
    batch = _padded(_batch(0))
    state, metrics = make_train_step(config, mesh)(init_state(config, mesh), batch)
    # Adam's first update is nearly a sign: compare its moments and the metrics, not the update.
    found = state.opt_state, metrics
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), whole, found)


def test_the_loss_is_the_sum_of_its_parts(mesh, whole):
    found = {name: float(value) for name, value in whole[1].items()}
    weighted = sum(weight * found[name] for name, weight in PENALTIES.weights.items())
    z_loss = found["loss"] - found["nll"] - weighted
    assert 0.1 < z_loss < 0.3  # ln(65)^2 / 100
    # A penalty is the model's own, whatever the padding holds.
    model = from_parameters(CONFIG.model, init_state(CONFIG, mesh).params)
    for name, value in _aux(model, _padded(_batch(0))).items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name


@jax.jit
def _aux(model, batch):
    return model(
        jnp.where(batch["segment_ids"] == 0, 3, batch["tokens"]),
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        penalties=("hidden_z_loss", "tweo", "decorrelation"),
    ).aux


def _padded(batch):
    """Rows of different length, so that a mean of means of the penalties would be wrong too."""
    real = np.arange(13) < np.asarray([13, 9, 5, 2, 11, 13])[:, None]
    return batch | {"segment_ids": real * np.int32(1), "loss_mask": real * batch["loss_mask"]}


def test_a_penalty_without_a_weight_is_not_computed(mesh):
    texts = []
    for penalties in (PenaltyConfig(), PenaltyConfig(decorrelation=1e-3)):
        config = dataclasses.replace(CONFIG, penalties=penalties)
        state, step = abstract_state(config, mesh), make_train_step(config, mesh)
        metrics = jax.eval_shape(step, state, _batch(0))[1]
        texts.append(str(jax.make_jaxpr(step)(state, _batch(0))))
        assert ("decorrelation" in metrics) == (penalties.decorrelation > 0)
    # Positions in a segment need one, the first token of each segment another.
    assert texts[0].count("cummax") < texts[1].count("cummax")


def test_chunked_logits_are_never_there_whole(mesh):
    model = dataclasses.replace(CONFIG.model, vocab_size=1031, num_layers=1)

    def largest(chunks):
        optimizer = OptimizerConfig(loss_chunks=chunks, accumulation_steps=2)
        config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer)
        with jax.set_mesh(mesh):
            state = abstract_state(config, mesh)
            text = make_train_step(config, mesh).lower(state, _batch(0)).as_text()
        shapes = re.findall(r"tensor<([\dx]+)x[a-z]", text)
        return max(math.prod(map(int, shape.split("x"))) for shape in shapes)

    tokens = 3 * 13
    assert largest(1) == tokens * 1031
    assert largest(4) < tokens * 1031 * 2 // 3  # the head has 22 * 1031


def test_logits_are_cut_where_they_would_be_larger_than_a_gibibyte():
    config = RunConfig(
        model=preset("llama3-8b"), data=DataConfig(batch_size=128), mesh=MeshConfig(-1, 1)
    )

    def chunks(rows, **axes):
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        return loss_chunks(config, mesh, rows)

    # 8,192 tokens x 128,256 numbers of 4 bytes are 3.9 GiB.
    assert chunks(128, data=128, model=1) == 4
    assert chunks(32, data=32, model=4) == 1
    assert chunks(128, data=32, model=4) == 4
    assert chunks(32, data=32, sequence=4, model=1) == 1
    assert loss_chunks(CONFIG, make_mesh(), 6) == 1
    given = dataclasses.replace(config, optimizer=OptimizerConfig(loss_chunks=7))
    assert loss_chunks(given, make_mesh(), 128) == 7


def test_the_state_is_donated(mesh):
    with jax.set_mesh(mesh):
        state = abstract_state(CONFIG, mesh)
        text = make_train_step(CONFIG, mesh).lower(state, _batch(0)).as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_the_seed_decides_the_parameters(mesh):
    one, again = init_state(CONFIG, mesh).params, init_state(CONFIG, mesh).params
    other = init_state(dataclasses.replace(CONFIG, seed=1), mesh).params
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one["embedding"]["embedding"] != other["embedding"]["embedding"]).any()


def test_abstract_state_is_the_state_without_its_numbers(mesh):
    abstract, state = abstract_state(CONFIG, mesh), init_state(CONFIG, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    jax.tree.map(
        lambda a, s: chex.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), abstract, state
    )


def test_evaluation_measures_the_sink_that_is_there(mesh):
    """A key of BOS that every query likes makes importance and sink rate 1 in that layer only."""
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, sinks=False, rope_theta=None)
    )
    params = init_state(config, mesh).params
    attention = params["blocks"][1]["attention"]
    attention["query"]["kernel"] = jnp.zeros_like(attention["query"]["kernel"]).at[0].set(5.0)
    attention["key"]["kernel"] = jnp.zeros_like(attention["key"]["kernel"]).at[1].set(5.0)
    attention["value"]["kernel"] = jnp.zeros_like(attention["value"]["kernel"]).at[2].set(1.0)
    table = jnp.full_like(params["embedding"]["embedding"], 0.1).at[:, 0].set(2.0)
    table = table.at[:, 1].set(0.0).at[:, 2].set(3.0)
    params["embedding"]["embedding"] = table.at[64, 1].set(2.0).at[64, 2].set(0.3)
    for block in params["blocks"].values():  # the residual stream is the embedding
        block["attention"]["out"]["kernel"] *= 0.0
        block["mlp"]["down"]["kernel"] *= 0.0
    found = make_eval_step(config, mesh)(params, _batch(0, mask=False))
    importance = np.asarray(found["importance"])
    assert importance.shape == (2, 3)
    np.testing.assert_allclose(importance[1], 1.0, atol=1e-3)
    assert importance[0].max() < 0.35  # about uniform: H_13 / 13 = 0.245
    assert float(found["sink_rate"]) == pytest.approx(0.5)
    assert float(found["first_token_share"][1]) == pytest.approx(1.0, abs=1e-3)
    assert float(found["value_drain"][1]) < 0.2
    assert found["residual_peak"].shape == found["activation_psi"].shape == (2, 2)
    assert np.asarray(found["entropy"])[1].max() < 0.1 < np.asarray(found["entropy"])[0].min()
    assert float(found["activation_max"].max()) == pytest.approx(3.0)
