import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.norms import rms_norm


def formula(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def test_equals_the_formula(x64: None) -> None:
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 5, 7)) * 9, rng.normal(size=7)
    got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.3)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, formula(x, scale, 0.3), rtol=1e-13)


def test_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 301)) * 100, jnp.bfloat16)
    scale = jnp.asarray(rng.normal(size=301), jnp.float32)
    got = rms_norm(x, scale)
    assert got.dtype == jnp.bfloat16
    exact = formula(np.asarray(x, np.float64), np.asarray(scale, np.float64), 1e-6)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)


def test_large_float16_does_not_overflow() -> None:
    got = rms_norm(jnp.full((1, 5), 3e4, jnp.float16), jnp.ones(5))
    np.testing.assert_allclose(got, 1.0, rtol=1e-3)


def test_zero_stays_zero() -> None:
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 3)), jnp.ones(3)), 0)


def test_a_scale_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale: expected shape \(5,\), got \(1,\)"):
        rms_norm.__wrapped__(jnp.ones((2, 5)), jnp.ones(1))
