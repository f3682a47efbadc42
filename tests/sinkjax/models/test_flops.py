import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.chips import CHIPS, chip, chip_of
from sinkjax.models.config import DecoderConfig
from sinkjax.models.flops import (
    active_weights,
    attention_forward,
    decode_flops,
    training_flops,
    utilization,
    visible_keys,
)
from sinkjax.models.parameters import abstract, count, from_parameters, parameters
from sinkjax.models.presets import preset

DENSE = DecoderConfig(
    vocab_size=131,
    model_dim=64,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=22,
    mlp_dim=172,
    context_length=13,
)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (None, 3), (5, 0), (5, 3), (40, 3)])
def test_visible_keys_are_those_of_the_mask(window, sinks):
    T = 29
    query, key = np.arange(T)[:, None], np.arange(T)[None]
    seen = key <= query
    if window is not None:
        seen &= (query - key < window) | (key < sinks)
    assert visible_keys(T, window, sinks) == seen.sum()


@pytest.mark.parametrize("tied", [False, True])
def test_products_are_those_that_the_compiler_counts(tied):
    config = dataclasses.replace(DENSE, tied_head=tied)
    params = parameters(abstract(config))
    tokens = jax.ShapeDtypeStruct((7, 13), jnp.int32)

    def loss(params, tokens):
        return from_parameters(config, params)(tokens).logits.sum()

    def counted(function):
        cost: Any = jax.jit(function).lower(params, tokens).cost_analysis()
        return cost["flops"] / (7 * 13)

    # Without a kernel the masked half of the logits is computed too.
    dense = attention_forward(config, [13 * 13] * 3) / 13
    assert counted(loss) == pytest.approx(2 * active_weights(config) + dense, rel=0.06)
    expected = training_flops(config)
    assert expected.recomputed == 0
    more = 3 * dense - expected.attention
    assert counted(jax.grad(loss)) == pytest.approx(expected.model + more, rel=0.06)


def test_closed_forms():
    D, L, N, K, H, F, V, T = 64, 3, 6, 2, 22, 172, 131, 13
    weights = L * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + D * V
    assert active_weights(DENSE) == weights
    got = training_flops(DENSE)
    assert got.projections == 6 * weights
    assert got.attention == 12 * L * N * H * (T + 1) / 2
    tied = dataclasses.replace(DENSE, tied_head=True)
    assert active_weights(tied) == weights  # looked up on the way in, multiplied on the way out
    # The norms and the lookup are all that is not multiplied.
    assert count(DENSE) - weights == V * D + (2 * L + 1) * D
    mixed = dataclasses.replace(DENSE, windows=(4, None), num_sink_tokens=2, num_layers=4)
    pairs = 2 * (visible_keys(13, 4, 2) + visible_keys(13))
    assert training_flops(mixed).attention == pytest.approx(12 * N * H * pairs / T)
    double = dataclasses.replace(DENSE, differential=True)
    assert training_flops(double).attention == 1.5 * got.attention


def test_experts_count_as_many_as_a_token_sees():
    config = dataclasses.replace(DENSE, num_experts=5, num_experts_per_token=2)
    D, L, F = 64, 3, 172
    assert active_weights(config) - active_weights(DENSE) == L * (D * 5 + 3 * D * F)


def test_rematerialisation_counts_apart():
    plain = training_flops(DENSE)
    inside = 2 * active_weights(DENSE, head=False)
    for remat, again in {
        "full": inside + plain.attention / 3,
        "attention": inside,
        "dots": plain.attention / 3,
    }.items():
        got = training_flops(dataclasses.replace(DENSE, remat=remat))
        assert got.model == plain.model
        assert got.hardware - got.model == pytest.approx(again)


def test_products_with_experts_are_computed_again_with_dots():
    config = dataclasses.replace(DENSE, num_experts=5, num_experts_per_token=2, remat="dots")
    got, D, L, F = training_flops(config), 64, 3, 172
    assert got.hardware - got.model == pytest.approx(got.attention / 3 + 2 * L * 2 * 3 * D * F)


def test_a_decoded_token_reads_what_the_cache_holds():
    windowed = dataclasses.replace(DENSE, windows=(4,), num_sink_tokens=2)
    per_key = 4 * 3 * 6 * 22
    base = 2 * active_weights(DENSE)
    assert decode_flops(DENSE, 100) == base + 100 * per_key
    for visible, seen in ((3, 3), (5, 5), (6, 6), (100, 6)):
        assert decode_flops(windowed, visible) == base + seen * per_key


def test_utilisation():
    config = preset("llama3-8b")
    flops = training_flops(config)
    # 8.03e9 parameters, 0.53e9 of them in the lookup.
    assert flops.projections == pytest.approx(6 * 7.5e9, rel=0.01)
    rate = 0.5 * 4 * 197e12 / flops.model
    assert utilization(config, rate, "TPU v5 lite", 4) == pytest.approx(0.5)
    # tpu7x has two devices to a chip.
    assert utilization(config, 1e3, "TPU7x", 2) == pytest.approx(flops.model * 1e3 / 2307e12)
    assert utilization(config, rate, "cpu", 4) is None


def test_chips_are_what_their_makers_say():
    from sinkjax_kernels.bench.chips import TPUS

    for core in TPUS:
        found = chip(core.name)
        shares = core.cores * (2 if core.name == "tpu7x" else 1)
        assert found.peak_flops == pytest.approx(shares * core.peak, rel=0.01)
        assert found.hbm_bandwidth == pytest.approx(shares * core.bandwidth, rel=0.01)
    for found in CHIPS.values():
        assert found.device_peak_flops * found.devices_per_chip == found.peak_flops
        assert found.link_bandwidth * found.links == found.ici_bandwidth
    kind = chip_of("TPU v5")
    assert kind is not None and kind.name == "v5p"
    assert chip_of("TPU v1") is None
    with pytest.raises(ValueError, match="chip: expected one of v4, v5e.*; got 'v3'"):
        chip("v3")
