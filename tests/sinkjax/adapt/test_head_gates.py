"""Head gates: the mixture against its formula, the schedule, and heads of a known class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.adapt import HeadGateConfig, toy_passkeys, train_head_gates
from sinkjax.adapt.head_gates import gated_layers, mixed_decoder
from sinkjax.cache.head_plan import HeadPlan
from sinkjax.models import DecoderConfig, abstract, parameters
from sinkjax.modules import Attention

CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    mlp_dim=13,
    context_length=64,
    windows=(None, 4),
    sinks=True,
    gate="elementwise",
    kv_bias="value",
    qk_norm=True,
)
GATES = HeadGateConfig(num_sink_tokens=2, window=5)


def test_the_mixture_is_per_key_value_head():
    """Of one layer: α o + (1 − α) o' for the query heads of a group, then the output kernel."""
    draw = lambda leaf: jnp.asarray(0.4 * random.normal(size=leaf.shape), "f4")  # noqa: E731
    random = np.random.default_rng(0)
    params = jax.tree.map(draw, parameters(abstract(CONFIG)))
    own, x = params["blocks"][0]["attention"], draw(np.empty((2, 17, 22)))
    alphas = jnp.array([[1.0, 0.3, 0.0]])
    assert gated_layers(CONFIG, 2, 5) == (0,)

    def heads(config):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, own)
        attention = nnx.merge(graphdef, state)
        _, found = nnx.capture(lambda m: m(x), nnx.Intermediate)(attention)
        return nnx.to_pure_dict(found)["attention_out"][0]

    @jax.jit
    def run():
        mixed = mixed_decoder(CONFIG, params, alphas, GATES)
        assert isinstance(mixed.blocks[1].attention, Attention)
        streaming = dataclasses.replace(CONFIG.layer(0), window=5, num_sink_tokens=2)
        return mixed.blocks[0].attention(x)[0], heads(CONFIG.layer(0)), heads(streaming)

    got, full, near = map(np.asarray, run())
    share = np.repeat(alphas[0], 2)[:, None]
    want = np.einsum("BTNH,NHD->BTD", share * full + (1 - share) * near, own["out"]["kernel"])
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(full - near).max() > 0.1


def test_known_heads_are_classed_right(planted):
    """Gates of retrieval heads stay at 1 and the others go to 0, in a few dozen steps.

    The layers are scanned, and the last sees no further than a streaming head: it is not asked.
    """
    config = HeadGateConfig(num_sink_tokens=2, window=17, steps=20, batch_size=2, learning_rate=0.1)
    before = jax.tree.map(np.asarray, parameters(planted.model))
    found = train_head_gates(planted.model, planted.task, config)
    retrieval = np.asarray(planted.retrieval)
    assert found.alphas[retrieval].min() > 0.9 and found.alphas[:2][~retrieval[:2]].max() < 0.1
    assert found.alphas[:2].min() == 0 and found.alphas[:2].max() <= 1
    assert np.isnan(found.alphas[2]).all()
    assert HeadPlan.from_scores(found.alphas, sparsity=2 / 3).retrieval == planted.retrieval
    first, last = found.history[0], found.history[-1]
    assert [record["step"] for record in found.history] == list(range(1, 21))
    # At the start every gate is 1, so the mixture is the model, and the loss the penalty alone.
    assert first["distillation"] == 0 and first["mean_alpha"] == 1
    assert first["loss"] == pytest.approx(0.05)
    assert last["loss"] == pytest.approx(last["distillation"] + 0.05 * last["mean_alpha"])
    assert last["mean_alpha"] == pytest.approx(found.alphas[:2].mean(), abs=0.05)
    assert max(record["learning_rate"] for record in found.history) == pytest.approx(0.1)
    jax.tree.map(np.testing.assert_array_equal, before, parameters(planted.model))


def test_schedule():
    """Up and down over a fifth of the steps each, from a tenth."""
    config = HeadGateConfig(steps=100, learning_rate=0.5)
    rate = np.asarray(config.rate(jnp.arange(100)))
    np.testing.assert_allclose(
        rate[[0, 1, 2, 9, 19, 20, 80]], [0.05, 0.05, 0.075, 0.25] + [0.5] * 3
    )
    np.testing.assert_allclose(rate[[81, 90, 98, 99]], [0.475, 0.25, 0.05, 0.05])
    np.testing.assert_allclose(HeadGateConfig(steps=3, ramp=0.0).rate(jnp.arange(3)), 0.02)
    defaults = HeadGateConfig()
    assert (defaults.steps, defaults.penalty, defaults.batch_size) == (2000, 0.05, 1)


@pytest.mark.parametrize(
    "config, gates, message",
    [
        (dataclasses.replace(CONFIG, windows=(4,)), {}, r"window: expected one shorter .* got 5"),
        (
            dataclasses.replace(
                CONFIG, kv_bias="none", num_heads=8, num_kv_heads=4, differential=True
            ),
            {},
            "differential=True",
        ),
        (
            dataclasses.replace(CONFIG, gate="output", gate_activation="additive"),
            {},
            "gate='output'",
        ),
        (CONFIG, {"window": 0}, "window: expected at least 1, got 0"),
        (CONFIG, {"ramp": 1.5}, "ramp: expected from 0 to 1, got 1.5"),
    ],
)
def test_bad_input(config, gates, message):
    with pytest.raises(ValueError, match=message):
        settings = dataclasses.replace(GATES, **gates)
        model = abstract(config)
        train_head_gates(model, toy_passkeys(24), settings)
