from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import (
    alibi_bias,
    alibi_decay,
    alibi_slopes,
    decay_bias,
    distances,
    dot_product_attention,
    join_sinks,
    learned_distance_bias,
)

B, T, S, N, K, H, R = 2, 11, 7, 6, 2, 5, 4


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-k for k in range(1, 9)], rtol=1e-6)
    twelve = np.asarray(alibi_slopes(12))
    np.testing.assert_allclose(twelve[1:] / twelve[:-1], 2 ** (-8 / 12), rtol=1e-6)
    np.testing.assert_allclose(twelve[[0, -1]], [2 ** (-8 / 12), 2**-8], rtol=1e-6)
    eight = np.asarray(alibi_slopes(8))
    np.testing.assert_array_equal(alibi_slopes(16, balanced=True), [*eight, *-eight])
    three, two = np.asarray(alibi_slopes(3)), np.asarray(alibi_slopes(3))[:2]
    np.testing.assert_array_equal(alibi_slopes(5, balanced=True), [*three, *-two])
    np.testing.assert_array_equal(alibi_slopes(1, balanced=True), alibi_slopes(1))
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        alibi_slopes(0)


def test_biases_of_any_distance():
    rng = np.random.default_rng(0)
    query, key = rng.integers(0, 9, (B, T)), rng.integers(0, 9, (B, S))
    distance = distances(jnp.asarray(query), jnp.asarray(key))
    slopes, table = rng.standard_normal(N), rng.standard_normal((N, R))
    linear, learned = np.zeros((2, B, N, T, S))
    for b, n, t, s in np.ndindex(B, N, T, S):
        d = abs(query[b, t] - key[b, s])
        linear[b, n, t, s] = -slopes[n] * d
        learned[b, n, t, s] = table[n, d] if d < R else 0
    np.testing.assert_array_equal(distance[:, 0], query[:, :, None] - key[:, None, :])
    assert distance.min() < -R and distance.max() > R
    np.testing.assert_allclose(alibi_bias(distance, jnp.asarray(slopes)), linear, rtol=1e-6)

    @jax.jit
    def with_gradient(table):
        bias, back = jax.vjp(lambda table: learned_distance_bias(distance, table), table)
        return bias, back(jnp.ones_like(bias))[0]

    got, counts = with_gradient(jnp.asarray(table, jnp.float32))
    np.testing.assert_allclose(got, learned, rtol=1e-6)
    # Every pair at a distance counts into its entry of the table, and no other does.
    want = [(np.abs(distance) == d).sum() for d in range(R)]
    np.testing.assert_array_equal(counts, np.broadcast_to(want, (N, R)))


def test_alibi_in_linear_memory(x64):
    """A bias per key and sinks that move: the same as a bias per pair; packed rows, a window."""
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.standard_normal((B, T, N, H)))
    key, value = (jnp.asarray(rng.standard_normal((B, T, K, H))) for _ in range(2))
    positions = jnp.asarray(np.stack([np.r_[:4, :7], np.r_[:9, -1, -1]]))
    segments = jnp.asarray(np.stack([np.repeat([1, 2], [4, 7]), np.repeat([1, 0], [9, 2])]))
    slopes = alibi_slopes(N, balanced=True)
    dense = alibi_bias(distances(positions, positions), slopes)
    linear, shift = decay_bias(alibi_decay(positions, slopes))
    assert linear.shape == (B, N, 1, T)
    options: dict[str, Any] = dict(
        is_causal=True,
        local_window_size=(5, 0),
        query_positions=positions,
        key_positions=positions,
        query_segment_ids=segments,
        key_segment_ids=segments,
    )
    per_token = jnp.asarray(rng.standard_normal((B, T, N)))

    @jax.jit
    def attend(bias, sinks=None):
        return dot_product_attention(query, key, value, bias, sinks=sinks, **options)

    zero = jnp.zeros((B, T, N))
    for name, given, sinks in (
        ("softmax", None, None),
        ("softmax1", None, zero),
        ("softmax", per_token, per_token),
    ):
        got = attend(linear, join_sinks(name, given, shift=shift)[1])
        np.testing.assert_allclose(got, attend(dense, sinks), rtol=0, atol=1e-12)
    assert np.abs(attend(0 * linear, per_token) - got)[0].max() > 0.01
