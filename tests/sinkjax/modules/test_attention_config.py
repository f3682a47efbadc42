"""Combinations without a meaning are refused, each with its reason; all others are taken."""

import dataclasses
import itertools

import pytest

from sinkjax.modules import AttentionConfig
from sinkjax.modules.variant import GATES, LayerVariant
from sinkjax_kernels import normalizers

BASE = AttentionConfig(model_dim=24, num_heads=4, num_kv_heads=2, head_dim=6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        # Two normalisers of one row.
        (dict(sinks=True, normalizer="softmax1"), "sinks: .*'softmax'.*term of its denominator"),
        (dict(sinks=True, normalizer="sigmoid"), "sinks: expected normalizer='softmax'"),
        (dict(token_sinks=True, normalizer="sparsemax"), "token_sinks: expected normalizer"),
        (dict(kv_bias="key", normalizer="relu"), "kv_bias: expected normalizer='softmax'"),
        (dict(kv_bias="context", normalizer="softpick"), "kv_bias: expected normalizer='softmax'"),
        (dict(num_sinks=2), "num_sinks: expected 1 without sinks, got 2"),
        (dict(num_kv_biases=2), "num_kv_biases: expected 1 with kv_bias='none', got 2"),
        (dict(kv_bias_position="none"), "kv_bias_position: expected start with kv_bias='none'"),
        (dict(kv_bias="value", differential=True), "kv_bias: .*belongs to two maps"),
        (dict(share_value=True, gate="value"), "gate: .*one tensor is both"),
        (dict(share_value=True, gate="value_state"), "gate: .*one tensor is both"),
        (dict(learn_normalizer=True), "learn_normalizer: .*constants to learn, got 'softmax'"),
        (dict(normalizer="stick_breaking", is_causal=False), "normalizer: .*needs is_causal=True"),
        (dict(differential=True, num_heads=3, num_kv_heads=3), "differential: expected even"),
        (dict(differential=True, num_kv_heads=1), "differential: expected even"),
        (dict(isolate_sinks=True, num_sink_tokens=2), "isolate_sinks: .*not causal"),
        (dict(isolate_sinks=True, is_causal=False), "isolate_sinks: .*num_sink_tokens=0"),
        (dict(forget_gate=True, normalizer="sigmoid"), "forget_gate: expected a causal layer with"),
        (dict(forget_gate=True, is_causal=False), "forget_gate: expected a causal layer"),
        (dict(forget_gate=True, alibi="standard"), "alibi: .*two decays"),
        (dict(gate_open=0.5), "gate_open: expected None with gate='none', got 0.5"),
        (dict(gate_activation="silu"), "gate_activation: expected sigmoid with gate='none'"),
        (dict(gate="headwise", gate_open=1.0), "gate_open: expected between 0 and 1, got 1.0"),
        (
            dict(gate="headwise", gate_open=2.0, gate_activation="twice_sigmoid"),
            "gate_open: expected between 0 and 2",
        ),
        (
            dict(gate="headwise", gate_open=0.5, gate_activation="silu"),
            "gate_open: expected None with gate_activation='silu'",
        ),
        (dict(gate="headwise", gate_rescale=True), "gate_rescale: expected gate_open"),
        (dict(gate="headwise", gate_init_std=-1.0), "gate_init_std: expected at least 0"),
        (dict(gate="conditional_head"), "gate: .*later tokens included"),
        (dict(gate="conditional_token", model_dim=22), "model_dim: expected a multiple of num"),
        (dict(distance_bias=-1), "distance_bias: expected at least 0, got -1"),
        (dict(num_sinks=0, sinks=True), "num_sinks: expected at least 1, got 0"),
        (dict(norm_placement="between"), "norm_placement: expected one of pre, post, sandwich"),
        (dict(alibi="steep"), "alibi: expected one of none, standard, balanced; got 'steep'"),
        (dict(normalizer="entmax(alpha=0.5)"), "alpha"),
        (dict(normalizer="relu(normalised=True)"), "normalizer .*relu takes"),
    ],
)
def test_refused_with_the_reason(fields, words):
    config = dataclasses.replace(BASE)
    for name, value in fields.items():  # past the type checks of the tests, not past the config's
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=words):
        config.__post_init__()


def test_every_gate_goes_with_every_normalizer_and_bias():
    """What is not refused above has a meaning: nothing else stands in the way of a combination."""
    names = sorted({normalizers.NAMES[kind] for kind in normalizers.NAMES})
    for name, gate in itertools.product(names, GATES):
        fields = {} if gate != "conditional_head" else {"is_causal": False}
        if name == "stick_breaking" and fields:
            continue
        dataclasses.replace(BASE, normalizer=name, gate=gate, **fields)
    for bias, gate in itertools.product(("key", "value", "key_value", "context"), GATES):
        causal = gate != "conditional_head"
        dataclasses.replace(BASE, kv_bias=bias, gate=gate, sinks=True, is_causal=causal)


def test_one_place_for_the_fields_of_a_variant():
    """The decoder has every field of a layer that is no size, with the same default."""
    from sinkjax.models import DecoderConfig

    of_layer = {f.name: f.default for f in dataclasses.fields(LayerVariant)}
    of_decoder = {f.name: f.default for f in dataclasses.fields(DecoderConfig)}
    assert of_layer.items() <= of_decoder.items()
    sizes = {"model_dim", "num_heads", "num_kv_heads", "head_dim", "window", "is_causal"}
    assert {f.name for f in dataclasses.fields(AttentionConfig)} == set(of_layer) | sizes
