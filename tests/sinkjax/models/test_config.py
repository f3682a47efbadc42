"""DecoderConfig refuses what cannot be built and derives the rest."""

import dataclasses

import pytest

from sinkjax.models import DecoderConfig

BASE = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=37,
    context_length=64,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(vocab_size=0), "vocab_size: expected at least 1, got 0"),
        (dict(num_layers=-1), "num_layers: expected at least 1, got -1"),
        (dict(mlp_dim=0), "mlp_dim: expected at least 1"),
        (dict(context_length=0), "context_length: expected at least 1"),
        (dict(num_kv_heads=4), "num_heads: expected a multiple of num_kv_heads=4, got 6"),
        (dict(windows=()), "windows: expected a non-empty tuple"),
        (dict(windows=(None, 0)), "window: expected at least 1 or None, got 0"),
        (dict(windows=(3,) * 7), "windows: expected at most num_layers=6 entries, got 7"),
        (dict(windows=(None,) * 4, scan_layers=True), "num_layers: expected a multiple .* 4 "),
        (dict(remat="half"), "remat: expected one of none, full, dots, .*; got 'half'"),
        (dict(normalizer="max"), "normalizer: expected one of softmax, "),
        (dict(num_learned_sink_tokens=31), "below vocab_size=31, got 31"),
        (
            dict(num_learned_sink_tokens=3, num_sink_tokens=2, windows=(5,)),
            "num_sink_tokens: expected at least num_learned_sink_tokens=3 .* got 2",
        ),
    ],
)
def test_impossible_configs_are_refused(change, words):
    config = dataclasses.replace(BASE)
    with pytest.raises(ValueError, match=words):
        for name, value in change.items():
            object.__setattr__(config, name, value)
        config.__post_init__()


def test_pattern_repeats_over_the_layers():
    config = dataclasses.replace(BASE, windows=(3, None, 5, 7), num_sink_tokens=2)
    assert [config.layer(i).window for i in range(6)] == [3, None, 5, 7, 3, None]
    assert config.layer(0).local_window_size == (2, 0)
    assert config.layer(5).num_sink_tokens == 2 and config.layer(5).is_causal


def test_every_field_of_a_layer_comes_from_the_config():
    change = dict(
        normalizer="softmax_n(n=2.0)",
        gate="elementwise",
        qk_norm=True,
        rope_theta=7.0,
        scale=0.5,
        logits_soft_cap=3.0,
        norm_epsilon=0.1,
        init_std=0.3,
        dtype="bfloat16",
        param_dtype="float16",
    )
    layer = dataclasses.replace(BASE, **change).layer(0)
    assert {name: getattr(layer, name) for name in change} == change
    assert dataclasses.replace(BASE, sinks=True).layer(0).sinks


def test_learned_sink_ids_are_the_last_of_the_vocabulary():
    assert BASE.learned_sink_ids == ()
    assert dataclasses.replace(BASE, num_learned_sink_tokens=3).learned_sink_ids == (28, 29, 30)


def test_config_is_hashable_and_frozen():
    assert hash(BASE) == hash(dataclasses.replace(BASE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.model_dim = 3  # pyright: ignore[reportAttributeAccessIssue]
