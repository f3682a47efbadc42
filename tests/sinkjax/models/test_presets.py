"""Presets have the sizes they are named after. Shapes only: nothing is allocated."""

import pytest

from sinkjax.models import PRESETS, count, preset


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # As published with the weights on the Hugging Face hub.
        ("llama3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen3-0.6b", 596_049_920),
        ("llama3-70b", 70_553_706_496),
        ("mixtral-8x7b", 46_702_792_704),
        # Less the biases of the attention projections, L (N H + 2 K H + D), which we have not.
        ("gpt-oss-20b", 20_914_757_184 - 24 * (4096 + 2 * 512 + 2880)),
        ("gpt-oss-120b", 116_829_156_672 - 36 * (4096 + 2 * 512 + 2880)),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert count(preset(name)) == parameters


def test_sizes_of_our_own():
    tiny = preset("tiny")
    assert count(tiny) - 2 * tiny.vocab_size * tiny.model_dim == pytest.approx(0.1e6, rel=0.02)
    assert tiny.vocab_size == preset("small").vocab_size == 257
    # GPT-2's 124,439,808 less its learned positions, biases and mean-centring.
    assert count(preset("gpt2")) == pytest.approx(124.4e6, rel=0.01)


def test_gpt_oss_alternates():
    config = preset("gpt-oss-20b")
    assert [config.layer(i).window for i in range(4)] == [128, None, 128, None]
    assert config.sinks and config.num_heads // config.num_kv_heads == 8
    assert (config.num_experts, config.num_experts_per_token) == (32, 4)


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="preset: expected one of tiny, .*llama3-8b.*'llama'"):
        preset("llama")
    assert list(PRESETS)[0] == "tiny"
