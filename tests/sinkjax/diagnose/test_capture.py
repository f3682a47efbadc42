"""Captured states against the model's own outputs and each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.diagnose import capture
from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters, unroll
from sinkjax.ops import statistics

CONFIG = DecoderConfig(
    vocab_size=23,
    model_dim=14,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=11,
    context_length=13,
    windows=(None, 3),
    normalizer="softmax1",
    init_std=0.4,
)
TOKENS = np.random.default_rng(0).integers(0, 23, size=(3, 7))


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(5))


@pytest.fixture(scope="module")
def seen(model):
    return capture(model, TOKENS)


def test_every_field_has_its_shape(seen):
    shapes = {
        field.name: getattr(seen, field.name).shape
        for field in dataclasses.fields(seen)
        if field.name not in ("statistics", "gate")
    }
    assert shapes == {
        "embedding": (3, 7, 14),
        "residual_attention": (4, 3, 7, 14),
        "residual_mlp": (4, 3, 7, 14),
        "weights": (4, 3, 6, 7, 7),
        "query": (4, 3, 7, 6, 4),
        "key": (4, 3, 7, 2, 4),
        "query_rotated": (4, 3, 7, 6, 4),
        "key_rotated": (4, 3, 7, 2, 4),
        "value": (4, 3, 7, 2, 4),
        "attention_out": (4, 3, 7, 6, 4),
        "logits": (3, 7, 23),
        "hidden": (3, 7, 14),
    }
    assert seen.gate is None
    assert seen.residual.shape == (4, 2, 3, 7, 14)


def test_the_captured_call_is_the_model_itself(model, seen):
    output = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(seen.logits, output.logits, atol=1e-5)
    np.testing.assert_allclose(model.final_norm(seen.residual_mlp[-1]), output.hidden, atol=1e-5)
    np.testing.assert_array_equal(seen.embedding, model.embedding(jnp.asarray(TOKENS)))


def test_weights_and_values_give_the_head_outputs(seen):
    value = np.repeat(np.asarray(seen.value), 3, axis=3)
    out = np.einsum("lbnts,lbsnh->lbtnh", seen.weights, value)
    np.testing.assert_allclose(seen.attention_out, out, atol=1e-5)


def test_the_two_half_blocks_are_where_they_say(model, seen):
    for layer, block in enumerate(model.blocks):
        before = seen.embedding if layer == 0 else seen.residual_mlp[layer - 1]
        written = np.einsum(
            "btnh,nhd->btd", seen.attention_out[layer], block.attention.out.kernel[...]
        )
        np.testing.assert_allclose(seen.residual_attention[layer] - before, written, atol=1e-5)


def test_rope_turns_keys_but_keeps_norms_and_the_first_token(seen):
    np.testing.assert_allclose(seen.key[:, :, 0], seen.key_rotated[:, :, 0], atol=1e-6)
    assert np.abs(seen.key[:, :, 5] - seen.key_rotated[:, :, 5]).max() > 0.1
    for plain, rotated in ((seen.key, seen.key_rotated), (seen.query, seen.query_rotated)):
        np.testing.assert_allclose(
            np.linalg.norm(plain, axis=-1), np.linalg.norm(rotated, axis=-1), rtol=1e-5
        )


def test_dense_weights_reduce_to_the_model_statistics(seen):
    index = np.arange(7)
    causal = index[None] <= index[:, None]
    window = causal & (index[:, None] - index[None] < 3)
    where = np.stack([causal, window, causal, window])[:, None, None]
    reduced = statistics.from_weights(seen.weights, jnp.asarray(where))
    for name, value in reduced.items():
        np.testing.assert_allclose(value, seen.statistics[name], atol=1e-5, err_msg=name)
    hidden = statistics.from_hidden(seen.residual)  # [L, 2, B, ...]
    for name, value in hidden.items():
        model_value = np.moveaxis(np.asarray(seen.statistics[f"residual_{name}"]), 2, 1)
        np.testing.assert_allclose(value, model_value, rtol=1e-5, err_msg=name)


def test_scanned_and_rematerialised_models_give_the_same_capture(seen):
    scanned = Decoder(dataclasses.replace(CONFIG, scan_layers=True, remat="full"), rngs=nnx.Rngs(5))
    again = capture(scanned, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, seen)


def test_the_gate_is_captured():
    config = dataclasses.replace(CONFIG, gate="elementwise", num_layers=2)
    model = Decoder(config, rngs=nnx.Rngs(1))
    seen = capture(model, TOKENS)
    assert seen.gate.shape == (2, 3, 7, 6, 4)
    x = model.blocks[0].attention_norm(seen.embedding)
    scores = np.einsum("btd,dnh->btnh", x, model.blocks[0].attention.gate.kernel[...])
    np.testing.assert_allclose(seen.gate[0], 1 / (1 + np.exp(-scores)), rtol=1e-4)


def test_segments_are_passed_on(model):
    segments = jnp.asarray(np.array([[1, 1, 1, 2, 2, 2, 0]] * 3))
    seen = capture(model, TOKENS, segment_ids=segments)
    assert float(jnp.abs(seen.weights[0, :, :, 3:6, :3]).max()) == 0.0
    assert float(seen.weights[0, :, :, 3:6, 3].min()) > 0.0


def test_capture_leaves_the_model_as_it_was(model):
    same = from_parameters(CONFIG, parameters(model))
    capture(model, TOKENS)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(same))
    assert unroll(model) is model
