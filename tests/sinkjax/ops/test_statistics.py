"""Metric formulas against hand-computed values and independent numpy float64 oracles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import statistics

L, B, N, T, K, H, D = 2, 3, 5, 7, 1, 11, 13


def causal_weights(seed=0, shape=(L, B, N, T, T)):
    logits = np.random.default_rng(seed).normal(size=shape) * 2
    logits = np.where(np.tri(shape[-2], shape[-1], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(("length", "expected"), [(32, 0.127), (64, 0.074)])
def test_uniform_causal_attention_has_the_published_importance(length, expected):
    uniform = jnp.tril(jnp.ones((length, length))) / jnp.arange(1, length + 1)[:, None]
    reduced = statistics.from_weights(uniform)
    alpha = statistics.importance(reduced["key_mass"], reduced["key_count"])
    harmonic = sum(1 / i for i in range(1, length + 1))
    assert alpha[0] == pytest.approx(harmonic / length, rel=1e-6)
    assert statistics.uniform_importance(length) == pytest.approx(harmonic / length, rel=1e-12)
    assert round(statistics.uniform_importance(length), 3) == expected
    assert alpha[-1] == pytest.approx(1 / length, rel=1e-6)
    assert statistics.uniform_importance(length, position=length - 1) == pytest.approx(1 / length)


def test_importance_divides_by_the_queries_that_see_the_key():
    # A = [[1, ., .], [.6, .4, .], [.2, .3, .5]]
    weights = jnp.array([[1.0, 0, 0], [0.6, 0.4, 0], [0.2, 0.3, 0.5]])
    reduced = statistics.from_weights(weights)
    np.testing.assert_array_equal(reduced["key_count"], [3, 2, 1])
    alpha = statistics.importance(reduced["key_mass"], reduced["key_count"])
    np.testing.assert_allclose(alpha, [0.6, 0.35, 0.5], rtol=1e-6)


def test_importance_is_zero_for_a_key_nobody_sees():
    alpha = statistics.importance(jnp.array([0.0, 2.0]), jnp.array([0.0, 4.0]))
    np.testing.assert_array_equal(alpha, [0.0, 0.5])


def test_sink_rate_equals_the_released_code():
    """The oracle is the published procedure: divide every row first, sum, threshold, mean."""
    weights = causal_weights()
    divided = weights / np.arange(T, 0, -1)[None, None, None, None, :]
    metric = (divided.sum(-2) > 0.3).mean(axis=(0, 1, 2))
    reduced = statistics.from_weights(jnp.asarray(weights, jnp.float32))
    assert 0 < metric[0] < 1
    for position in (0, 2, T - 1):
        rate = statistics.sink_rate(
            reduced["key_mass"], reduced["key_count"], epsilon=0.3, position=position
        )
        assert rate == pytest.approx(metric[position], abs=1e-6)


def test_the_order_of_averaging_matters():
    mass = jnp.array([0.1, 0.1, 0.9]).reshape(3, 1, 1)  # B=3 samples, one head, one query
    count = jnp.ones((3, 1, 1))
    assert statistics.sink_rate(mass, count) == pytest.approx(1 / 3)
    assert statistics.sink_rate(mass, count, order="mean_first") == 1.0
    assert statistics.sink_rate(mass, count, epsilon=0.4, order="mean_first") == 0.0


def test_sink_rate_by_head_keeps_layers_and_heads_apart():
    mass = jnp.zeros((L, B, N, T)).at[1, :, 3, 0].set(0.9 * T).at[0, 1, 2, 0].set(0.8 * T)
    count = jnp.broadcast_to(jnp.arange(T, 0, -1.0), mass.shape)
    expected = np.zeros((L, N))
    expected[1, 3], expected[0, 2] = 1.0, 1 / B
    by_head = statistics.sink_rate_by_head(mass, count)
    np.testing.assert_allclose(by_head, expected, rtol=1e-6)
    assert statistics.sink_rate(mass, count) == pytest.approx(expected.mean(), rel=1e-6)


def test_a_sample_in_which_nobody_sees_the_key_does_not_count():
    mass = jnp.array([[[0.9, 0.0]], [[0.0, 0.0]]])
    count = jnp.array([[[1.0, 1.0]], [[0.0, 0.0]]])
    assert statistics.sink_rate(mass, count) == 1.0
    assert statistics.sink_rate(mass, count, order="mean_first") == 1.0


def test_raw_and_row_normalised_differ_for_signed_and_small_rows():
    # a softmax1-like head: rows sum to far less than one, but what there is falls on key 0
    weights = jnp.array([[0.1, 0], [0.09, 0.01]])
    reduced = statistics.from_weights(weights[None, None])
    raw = statistics.sink_rate(reduced["key_mass"], reduced["key_count"])
    normalised = statistics.sink_rate(reduced["key_mass_normalized"], reduced["key_count"])
    assert (raw, normalised) == (0.0, 1.0)
    # signed weights are normalised by the sum of magnitudes
    signed = statistics.from_weights(jnp.array([[2.0, 0], [-3.0, 1.0]]))
    np.testing.assert_allclose(signed["key_mass"], [-1.0, 1.0])
    np.testing.assert_allclose(signed["key_mass_normalized"], [1.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(signed["row_mass"], [2.0, -2.0])


def test_from_weights_takes_a_mask_and_ignores_what_it_hides():
    weights = jnp.full((T, T), 0.5)
    where = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-2, dtype=bool)  # a window of 2
    reduced = statistics.from_weights(weights, where)
    np.testing.assert_array_equal(reduced["key_count"], [2] * (T - 1) + [1])
    np.testing.assert_allclose(reduced["key_mass"], [1.0] * (T - 1) + [0.5])
    np.testing.assert_allclose(reduced["entropy"], [0.0] + [math.log(2)] * (T - 1), atol=1e-6)


def test_first_token_share_counts_queries_that_do_not_see_the_token():
    where = jnp.tri(4, dtype=bool) & ~jnp.tri(4, k=-2, dtype=bool)
    weights = jnp.where(where, 1.0, 0.0) / jnp.sum(where, -1, keepdims=True)
    reduced = statistics.from_weights(jnp.broadcast_to(weights, (B, N, 4, 4)), where)
    share = statistics.first_token_share(reduced["key_mass"], reduced["key_count"])
    assert share == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    alpha = statistics.importance(reduced["key_mass"], reduced["key_count"])[0, 0, 0]
    assert alpha == pytest.approx((1 + 0.5) / 2)


def test_first_token_share_of_a_padded_batch_divides_by_real_queries():
    weights = causal_weights(shape=(2, 1, 5, 5))
    real = np.arange(5) < np.array([5, 3])[:, None]
    where = np.tri(5, dtype=bool) & real[:, None, :, None] & real[:, None, None, :]
    reduced = statistics.from_weights(jnp.asarray(weights, jnp.float32), jnp.asarray(where))
    share = statistics.first_token_share(reduced["key_mass"], reduced["key_count"])
    oracle = np.mean([weights[0, 0, :, 0].mean(), weights[1, 0, :3, 0].mean()])
    assert share == pytest.approx(oracle, rel=1e-5)


def test_first_token_share_is_per_layer_then_over_layers():
    weights = causal_weights()
    reduced = statistics.from_weights(jnp.asarray(weights, jnp.float32))
    oracle = weights[..., 0].mean(axis=(1, 2, 3))
    by_layer = statistics.first_token_share_by_layer(reduced["key_mass"], reduced["key_count"])
    np.testing.assert_allclose(by_layer, oracle, rtol=1e-5)
    total = statistics.first_token_share(reduced["key_mass"], reduced["key_count"])
    assert total == pytest.approx(oracle.mean(), rel=1e-5)


def test_entropy_by_head():
    uniform = jnp.tril(jnp.ones((T, T))) / jnp.arange(1, T + 1)[:, None]
    weights = jnp.stack([uniform, jnp.eye(T)])[None]  # B=1, two heads
    entropy = statistics.from_weights(weights)["entropy"]
    expected = float(np.mean([math.log(t) for t in range(1, T + 1)]))
    np.testing.assert_allclose(statistics.entropy_by_head(entropy), [expected, 0.0], atol=1e-6)
    only_last = jnp.arange(T)[None] == T - 1
    np.testing.assert_allclose(
        statistics.entropy_by_head(entropy, only_last), [math.log(T), 0.0], atol=1e-6
    )


def test_norm_ratio_and_the_two_orders_of_value_norm_drain():
    norms = jnp.array([[[1.0, 2.0, 4.0]], [[6.0, 1.0, 1.0]]])  # B=2, K=1, S=3
    np.testing.assert_allclose(statistics.norm_ratio(norms)[:, 0], [1 / 3, 6.0], rtol=1e-6)
    assert statistics.value_norm_drain(norms) == pytest.approx(3.5 / 2.0)
    assert statistics.value_norm_drain(norms, order="per_sample") == pytest.approx((1 / 3 + 6) / 2)
    assert statistics.key_norm_ratio(norms) == pytest.approx(3.5 / 2.0)
    assert statistics.norm_ratio(norms, position=1)[0, 0] == pytest.approx(2.0 / 2.5)


def test_norm_ratios_leave_padding_out():
    norms = jnp.array([[[1.0, 2.0, 4.0]], [[6.0, 1.0, 99.0]]])
    real = jnp.array([[True, True, True], [True, True, False]])
    drain = statistics.value_norm_drain(norms, token_mask=real)
    assert drain == pytest.approx(3.5 / np.mean([1.5, 4.0]))
    per_sample = statistics.value_norm_drain(norms, order="per_sample", token_mask=real)
    assert per_sample == pytest.approx((1 / 3 + 6) / 2)


def test_residual_peak_per_half_block():
    norms = jnp.ones((L, B, 2, T)).at[1, :, 1, 0].set(8.0)
    peak = statistics.residual_peak(norms)
    np.testing.assert_allclose(peak, [[1.0, 1.0], [1.0, 8.0]])
    real = jnp.arange(T)[None] < jnp.array([[T], [T], [4]])
    padded = jnp.where(real[:, None, :], norms, 1000.0)
    np.testing.assert_allclose(statistics.residual_peak(padded, token_mask=real), peak)


def test_key_cosines_against_loops():
    rng = np.random.default_rng(1)
    query, key = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 2, 3))  # T=4, N=6, K=2
    sink, others = np.zeros(6), np.zeros(6)
    for n in range(6):
        for t in range(1, 4):
            cosines = [
                query[t, n]
                @ key[j, n // 3]
                / np.linalg.norm(query[t, n])
                / np.linalg.norm(key[j, n // 3])
                for j in range(t + 1)
            ]
            sink[n] += cosines[0] / 3
            others[n] += np.mean(cosines[1:]) / 3
    got = statistics.key_cosines(jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32))
    np.testing.assert_allclose(got[0], sink, atol=1e-6)
    np.testing.assert_allclose(got[1], others, atol=1e-6)


def test_gate_statistics_and_dead_heads():
    gate = jnp.array([[0.0, 0.5], [0.25, 0.0]])
    assert statistics.gate_statistics(gate) == {"mean": 0.1875, "zero_fraction": 0.5}
    output = jnp.ones((2, 20, 3, H)).at[:, :, 1].set(0.0).at[:, :17, 2].set(1e-7)
    np.testing.assert_array_equal(statistics.dead_heads(output), [False, True, False])
    np.testing.assert_array_equal(statistics.dead_heads(output, tokens=0.8), [False, True, True])


def test_the_metrics_of_a_training_step_run_inside_jit():
    @jax.jit
    def step(weights, norms):
        reduced = statistics.from_weights(weights)
        rate = statistics.sink_rate(reduced["key_mass"], reduced["key_count"])
        return rate, statistics.value_norm_drain(norms)

    rate, drain = step(jnp.asarray(causal_weights(), jnp.float32), jnp.ones((L, B, K, T)))
    assert rate.shape == () and drain.shape == (L,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: statistics.sink_rate(a, a, order="mean"), "order: expected 'per_sample' or"),
        (lambda a: statistics.sink_rate(a, a, position=7), r"position: expected 0 <= position < 7"),
        (lambda a: statistics.first_token_share(a, a, -1), "position: expected"),
        (lambda a: statistics.value_norm_drain(a, order="x"), "order: expected"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((B, N, T)))
