"""Attention mass outside sinks and window: against dense weights, and on heads of a known class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.adapt import outside_mass, streaming_config
from sinkjax.adapt.head_classes import _sums
from sinkjax.cache.head_plan import HeadPlan
from sinkjax.diagnose.capture import capturable, run
from sinkjax.models import DecoderConfig, abstract, from_parameters, parameters

P, W, T = 2, 5, 19
CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=1,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    mlp_dim=13,
    context_length=64,
    windows=(9,),
    num_sink_tokens=1,
    sinks=True,
    token_sinks=True,
    kv_bias="key_value",
    alibi="balanced",
    logits_soft_cap=7.0,
)


def dense(weights, positions, where):
    """The mass by its definition, from weights [L, B, N, T, S]; positions and where [B, T]."""
    distance = positions[:, :, None] - positions[:, None, :]
    outside = (positions[:, None, :] >= P) & (distance >= W)
    mass = np.where(outside[:, None], np.asarray(weights, np.float64), 0).sum(-1)
    counts = (where & (positions >= P + W))[:, None]
    of_heads = np.where(counts, mass, 0).sum((1, 3)) / counts.sum()
    return of_heads.reshape(CONFIG.num_layers, CONFIG.num_kv_heads, -1).max(-1)


def test_mass_is_that_of_the_dense_weights():
    """Packed rows and padding, with everything that can be in a softmax's denominator."""
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.4 * random.normal(size=leaf.shape), "f4")  # noqa: E731
    model = from_parameters(CONFIG, jax.tree.map(draw, parameters(abstract(CONFIG))))
    tokens = random.integers(31, size=(3, T))
    segments = np.where(np.arange(T) < 11, 1, 2) * np.ones((3, 1), np.int32)
    segments[1] = 1
    segments[2] = np.arange(T) < 16
    positions = np.where(segments == 2, np.arange(T) - 11, np.arange(T))
    where = random.random((3, T)) < 0.7
    weights = jax.jit(lambda model, *args: run(model, args[0], segment_ids=args[1]).weights)(
        model, tokens, segments
    )
    got = outside_mass(
        model, tokens, num_sink_tokens=P, window=W, segment_ids=segments, where=where, batch_size=3
    )
    want = dense(weights, positions, where & (segments > 0))
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert 0.02 < want.min() and want.max() < 0.98


def test_known_heads_are_classed_right(planted):
    batch = planted.task.rows(np.arange(6))
    scores = outside_mass(
        planted.model,
        batch["tokens"],
        num_sink_tokens=2,
        window=17,
        where=batch["tokens"] >= 0,
        batch_size=3,
    )
    retrieval = np.asarray(planted.retrieval)
    assert scores[retrieval].min() > 0.3 and scores[:2][~retrieval[:2]].max() < 0.01
    assert np.isnan(scores[2]).all()
    for cut in ({"sparsity": 2 / 3}, {"threshold": 0.1}):
        assert HeadPlan.from_scores(scores, **cut).retrieval == planted.retrieval


def test_streaming_config():
    layer = CONFIG.layer(0)
    assert streaming_config(layer, P, 9) is None
    assert streaming_config(layer, P, 8) == dataclasses.replace(layer, window=8, num_sink_tokens=P)
    assert streaming_config(dataclasses.replace(layer, window=None), P, 999) is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": "sigmoid"}, "normalizer: expected softmax, .* got 'sigmoid'"),
        ({"forget_gate": True}, "forget_gate: expected none here, got True"),
        ({"distance_bias": 4}, "distance_bias: expected none here, got 4"),
        ({}, r"tokens: expected some query at position 19 .* got rows of 62 tokens"),
    ],
)
def test_bad_input(changes, message, planted):
    if not changes:
        with pytest.raises(ValueError, match=message):
            tokens = planted.task.rows(np.arange(6))["tokens"]
            outside_mass(
                planted.model, tokens, num_sink_tokens=2, window=17, where=tokens < 0, batch_size=3
            )
        return
    config = dataclasses.replace(planted.model.config, **changes)
    with pytest.raises(ValueError, match=message):
        outside_mass(abstract(config), np.zeros((1, T), int))


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    graphdef, state = nnx.split(capturable(abstract(dataclasses.replace(CONFIG, windows=(None,)))))

    def temporary(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        none = dict.fromkeys(("positions", "segment_ids", "where"))
        compiled = _sums.lower(graphdef, P, W, state, tokens, **none).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.2 * short
