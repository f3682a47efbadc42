import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.norms import (
    dynamic_tanh,
    gated_norm,
    pre_affine_norm,
    rms_norm,
    single_scale_norm,
)

D, R = 7, 4


def formula(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def gated(x: np.ndarray, scale: np.ndarray, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    y = formula(x, scale, 0.3)
    inside = y @ down
    return y / (1 + np.exp(-(inside / (1 + np.exp(-inside))) @ up))


# Function, its NumPy form, the shapes of its parameters; epsilon is 0.3 where there is one.
NORMS = {
    "rms": (
        lambda *a: rms_norm(*a, 0.3),
        lambda x, w: formula(x, w, 0.3),
        [(D,)],
    ),
    "single_scale": (
        lambda *a: single_scale_norm(*a, 0.3),
        lambda x, w: formula(x, w, 0.3),
        [()],
    ),
    "pre_affine": (
        lambda *a: pre_affine_norm(*a, 0.3),
        lambda x, before, w: formula(before * x, w, 0.3),
        [(D,), (D,)],
    ),
    "gated": (lambda *a: gated_norm(*a, 0.3), gated, [(D,), (D, R), (R, D)]),
    "dynamic_tanh": (
        dynamic_tanh,
        lambda x, a, w, b: w * np.tanh(a * x) + b,
        [(), (D,), (D,)],
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_equals_the_formula(x64: None, name: str) -> None:
    function, expected, shapes = NORMS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, D)) * 2
    params = [np.asarray(rng.normal(size=shape)) for shape in shapes]
    got = function(*map(jnp.asarray, (x, *params)))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected(x, *params), rtol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_float16_keeps_its_type_and_its_range(name: str) -> None:
    function, expected, shapes = NORMS[name]
    rng = np.random.default_rng(1)
    # A square of these overflows float16.
    x = jnp.asarray(rng.normal(size=(3, D)) * 1e4, jnp.float16)
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    got, slopes = jax.value_and_grad(
        lambda *a: function(*a).astype(jnp.float32).sum(), tuple(range(1 + len(shapes)))
    )(x, *params)
    exact = expected(*(np.asarray(a, np.float64) for a in (x, *params)))
    np.testing.assert_allclose(got, exact.sum(), rtol=5e-3, atol=5e-3)
    assert function(x, *params).dtype == jnp.float16
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)


def test_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 301)) * 100, jnp.bfloat16)
    scale = jnp.asarray(rng.normal(size=301), jnp.float32)
    got = rms_norm(x, scale)
    assert got.dtype == jnp.bfloat16
    exact = formula(np.asarray(x, np.float64), np.asarray(scale, np.float64), 1e-6)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)


@pytest.mark.parametrize("name", NORMS)
def test_zero_stays_zero(name: str) -> None:
    function, _, shapes = NORMS[name]
    params = [jnp.ones(shape) for shape in shapes]
    if name == "dynamic_tanh":
        params[-1] = jnp.zeros(D)
    np.testing.assert_array_equal(function(jnp.zeros((2, D)), *params), 0)


def test_one_scale_commutes_with_rotations_and_many_do_not(x64: None) -> None:
    rng = np.random.default_rng(2)
    x, turn = rng.normal(size=(5, D)), np.linalg.qr(rng.normal(size=(D, D)))[0]
    after = single_scale_norm(jnp.asarray(x), jnp.asarray(1.7)) @ turn
    before = single_scale_norm(jnp.asarray(x @ turn), jnp.asarray(1.7))
    np.testing.assert_allclose(before, after, rtol=1e-12, atol=1e-12)
    scale = jnp.asarray(rng.normal(size=D))
    gap = rms_norm(jnp.asarray(x @ turn), scale) - rms_norm(jnp.asarray(x), scale) @ turn
    assert float(jnp.abs(gap).max()) > 0.1


def test_parameters_of_another_size_are_refused() -> None:
    x, good, bad = jnp.ones((2, 5)), jnp.ones(5), jnp.ones(1)
    for call, name in (
        (lambda: rms_norm.__wrapped__(x, bad), "scale"),
        (lambda: single_scale_norm.__wrapped__(x, bad), "scale"),
        (lambda: pre_affine_norm.__wrapped__(x, bad, good), "pre_scale"),
        (lambda: gated_norm.__wrapped__(x, good, jnp.ones((3, 4)), jnp.ones((4, 5))), "down"),
        (lambda: gated_norm.__wrapped__(x, good, jnp.ones((5, 4)), jnp.ones((3, 5))), "up"),
        (lambda: dynamic_tanh.__wrapped__(x, bad, good, good), "alpha"),
        (lambda: dynamic_tanh.__wrapped__(x, jnp.ones(()), good, bad), "bias"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(.*\), got \("):
            call()
