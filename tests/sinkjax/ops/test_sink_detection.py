"""Sink detection: each score against a plain formula, and what must not count as a sink."""

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.ops import sink_detection as detection
from sinkjax.ops import statistics

L, B, N, T, D = 3, 2, 5, 37, 11


def test_mass_is_the_mean_over_layers_heads_and_queries_that_see_the_key():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(L, B, N, T, T))
    logits[:, 0, :, :, 14] += 6  # row 0 has its sink there, row 1 nowhere
    logits[..., np.arange(T), np.arange(T)] += 4  # and everybody looks at itself
    seen = np.tri(T, dtype=bool)
    weights = np.where(seen, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)

    @jax.jit
    def run(weights):
        reduced = statistics.from_weights(weights)
        arrays = reduced["key_mass"], reduced["key_count"]
        return detection.mass_scores(*arrays), detection.mass_scores(*arrays, least_mass=0.0)

    got, loose = run(jnp.asarray(weights, jnp.float32))
    alpha = weights.sum(-2) / seen.sum(0)
    want = np.where(weights.sum(-2).mean((0, 2)) >= 4, alpha.mean((0, 2)), 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.argwhere(got > detection.MASS_EPSILON).tolist() == [[0, 14]]
    # Without the bound on the mass the last tokens, seen by hardly any other, would be sinks.
    assert (np.asarray(loose)[1, -3:] > detection.MASS_EPSILON).all()


def test_outlier_ratio_is_of_maxima_to_their_median():
    x = np.random.default_rng(1).normal(size=(L, B, T, D)).astype(np.float32)
    x[1, 0, 14, 3], x[2, 1, 5, 7] = -900.0, 60.0
    real = np.arange(T) < np.array([[T], [20]])
    x[:, 1, 20:] = 1e6  # padding
    got = np.asarray(jax.jit(detection.outlier_scores)(x, real))
    size = np.abs(x).max(-1)
    for layer, b in np.ndindex(L, B):
        mine = size[layer, b, real[b]]
        np.testing.assert_allclose(got[layer, b, real[b]], mine / np.median(mine), rtol=1e-5)
    assert (got[:, 1, 20:] == 0).all()
    found = np.argwhere(got.max(0) > detection.OUTLIER_RATIO)
    assert found.tolist() == [[0, 14]]  # 900 is, 60 is not


def test_stable_channels_carry_the_sink_and_others_do_not():
    layers = 7
    h = np.random.default_rng(2).normal(size=(layers, B, T, D)).astype(np.float32)
    real = np.arange(T) < np.array([[T], [30]])
    h[2:6, 0, [0, 14], 4] = [800.0, -500.0]  # emerges at layer 2, is gone at the last
    h[:, :, :, 9] += 300.0  # large in every token: no outlier token
    h[3, 1, 8, 2] = 700.0  # a single layer
    h[:, 1, 30:, 6] = 1e5  # padding
    x, where = jnp.asarray(h), jnp.asarray(real)

    @jax.jit
    def run(x, where):
        peaks = detection.channel_peaks(x, where)
        channels = detection.stable_channels(peaks)
        layer = detection.emergence_layer(peaks, channels)
        return peaks, channels, layer, detection.channel_scores(x[layer], channels, where)

    peaks, channels, layer, scores = run(x, where)
    assert np.flatnonzero(channels).tolist() == [4] and int(layer) == 2
    size = np.where(real[..., None], np.abs(h), np.nan)
    usual = np.maximum(np.nanmedian(size, (1, 2)), np.nanmedian(size, (1, 2, 3))[:, None])
    np.testing.assert_allclose(peaks, np.nanmax(size, (1, 2)) / usual, rtol=1e-5)
    assert np.argwhere(scores > detection.OUTLIER_RATIO).tolist() == [[0, 0], [0, 14]]
    np.testing.assert_allclose(scores[0, 14], 500 / usual[2, 4], rtol=1e-5)
    # Nothing stands out: no channel, no layer, no sink.
    calm = jnp.asarray(np.random.default_rng(3).normal(size=h.shape).astype(np.float32))
    _, channels, layer, scores = run(calm, where)
    assert not channels.any() and int(layer) == layers and (np.asarray(scores) == 0).all()
