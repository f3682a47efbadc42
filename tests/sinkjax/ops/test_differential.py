import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import combine, differential_lambda, dot_product_attention, widen_values

B, T, N, K, H = 2, 7, 12, 4, 5


def test_the_published_layer(x64):
    """As the authors compute it: neighbouring heads are a pair, each pair has one wide value."""
    normal = np.random.default_rng(0).standard_normal
    query, key, value = normal((B, T, N, H)), normal((B, T, K, H)), normal((B, T, K, H))
    vectors, gain = normal((4, H)) * 0.5, normal(2 * H)
    first, second, third, fourth = map(jnp.asarray, vectors)
    lam = differential_lambda(first, second, third, fourth)
    wide = widen_values(jnp.asarray(value))
    assert wide.shape == (B, T, K, 2 * H)
    attend = jax.jit(functools.partial(dot_product_attention, is_causal=True))
    maps = attend(jnp.asarray(query), jnp.asarray(key), wide)
    got = combine(maps, lam, jnp.asarray(gain))

    number = np.exp(vectors[0] @ vectors[1]) - np.exp(vectors[2] @ vectors[3]) + 0.8
    np.testing.assert_allclose(lam, number, rtol=1e-12)
    pairs, groups = N // 2, N // K
    # [B, T, pair, 2, H]: our head p and p + N/2 are the authors' 2p and 2p + 1.
    q = np.stack([query[:, :, :pairs], query[:, :, pairs:]], axis=3)
    k = np.stack([key[:, :, : K // 2], key[:, :, K // 2 :]], axis=3).repeat(groups, axis=2)
    v = np.concatenate([value[:, :, : K // 2], value[:, :, K // 2 :]], -1).repeat(groups, axis=2)
    logits = np.einsum("btpih,bspih->bpits", q, k) / H**0.5
    logits = np.where(np.tri(T, dtype=bool), logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.einsum("bpts,bsph->btph", weights[:, :, 0] - number * weights[:, :, 1], v)
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5) * gain * 0.2
    want = np.concatenate([out[..., :H], out[..., H:]], axis=2)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_equal_maps_cancel():
    """With λ = 1 and two equal maps nothing is left, sinks included."""
    half = np.random.default_rng(1).standard_normal((B, T, N // 2, 2 * H))
    out = jnp.asarray(np.concatenate([half, half], axis=2), jnp.bfloat16)
    left = combine(out, jnp.ones(()), jnp.ones(2 * H), lambda_init=0.3)
    assert (left.shape, left.dtype) == ((B, T, N, H), jnp.bfloat16)
    np.testing.assert_array_equal(left, 0)


def test_lambda_at_the_start_is_its_constant():
    zeros = jnp.zeros(H, jnp.bfloat16)
    lam = differential_lambda(zeros, zeros, zeros, zeros, 0.35)
    assert lam.dtype == jnp.float32
    np.testing.assert_allclose(lam, 0.35, rtol=1e-6)


def test_heads_of_a_cache():
    value = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, K, H)))
    leaf = widen_values(value.swapaxes(1, 2), axis=1)
    np.testing.assert_array_equal(leaf.swapaxes(1, 2), widen_values(value))


def test_bad_input():
    with pytest.raises(ValueError, match="value: expected an even number of heads K, got 3"):
        widen_values(jnp.zeros((B, T, 3, H)))
    with pytest.raises(ValueError, match=r"out: expected .* even N, got \(2, 7, 3, 10\)"):
        combine(jnp.zeros((B, T, 3, 10)), jnp.ones(()), jnp.ones(10))
    with pytest.raises(ValueError, match=r"out: expected .* got \(2, 7, 4, 5\)"):
        combine(jnp.zeros((B, T, 4, 5)), jnp.ones(()), jnp.ones(5))
