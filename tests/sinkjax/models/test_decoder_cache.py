"""Decoder with a cache: a text in pieces gives the logits of the text in one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full, SinkWindow
from sinkjax.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=37,
    context_length=64,
    sinks=True,
    gate="elementwise",
    qk_norm=True,
    windows=(4, None),
    num_sink_tokens=2,
    init_std=0.2,
    scan_layers=True,
)
B, T = 3, 23
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (B, T)))


whole = jax.jit(lambda model, tokens, positions: model(tokens, positions=positions))
step = jax.jit(
    lambda model, tokens, cache, positions=None: model(tokens, positions=positions, cache=cache)
)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def test_full_cache_equals_the_whole_text(model):
    cache = model.init_cache(Full(T), B)
    expected = whole(model, TOKENS, jnp.arange(T))
    assert expected.cache is None
    logits = []
    for part in jnp.split(TOKENS, [7, 14, 21, 22], axis=1):
        output = step(model, part, cache)
        logits.append(output.logits)
        cache = output.cache
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected.logits, atol=3e-5)
    np.testing.assert_array_equal(cache.time, [T] * B)


def test_padding_and_the_clock(model):
    """Row 1 skips two tokens of the first chunk; the second chunk goes on where each row is."""
    index = jnp.tile(jnp.arange(T), (B, 1))
    cache = step(model, TOKENS[:, :7], model.init_cache(Full(T), B), index[:, :7].at[1, 5:].set(-1))
    np.testing.assert_array_equal(cache.cache.time, [7, 5, 7])
    got = step(model, TOKENS[:, 7:14], cache.cache)
    np.testing.assert_array_equal(got.cache.time, [14, 12, 14])
    short = jnp.concatenate([TOKENS[1, :5], TOKENS[1, 7:], TOKENS[1, 5:7]])
    want = whole(model, TOKENS.at[1].set(short), jnp.arange(T)).logits
    np.testing.assert_allclose(got.logits[0], want[0, 7:14], atol=3e-5)
    np.testing.assert_allclose(got.logits[1], want[1, 5:12], atol=3e-5)


def test_layers_ask_for_what_they_were_trained_with(model):
    cache = model.init_cache(SinkWindow(num_sink_tokens=1, window=9), B, dtype="bfloat16")
    slots = [layer.key.shape for layer in cache.layers]
    assert slots == [(B, 2, 6, 10), (B, 2, 10, 10)] * 2
    assert cache.layers[0].key.dtype == jnp.bfloat16
    assert model.init_cache(Full(5), B).layers[0].key.dtype == jnp.float32
    with pytest.raises(ValueError, match="context_length=64"):
        model.init_cache(SinkWindow(num_sink_tokens=1, window=64), B)


def test_statistics_with_a_cache_are_those_of_the_stream():
    model = Decoder(dataclasses.replace(CONFIG, scan_layers=False, num_layers=2), rngs=nnx.Rngs(0))
    run = jax.jit(lambda model, cache: model(TOKENS, cache=cache, statistics=True).statistics)
    found, want = run(model, model.init_cache(Full(T), B)), run(model, None)
    assert set(found) == {"residual_norm", "residual_top", "residual_median"}
    for name, value in found.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-6)


def test_segments_are_refused(model):
    with pytest.raises(ValueError, match="segment_ids: expected None with a cache"):
        model(TOKENS, segment_ids=jnp.ones_like(TOKENS), cache=model.init_cache(Full(T), B))
