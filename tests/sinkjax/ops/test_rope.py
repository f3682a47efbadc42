"""Rotation is exact far out, relative, and harmless to padding."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import rope as rope_ops
from sinkjax.ops.rope import Rope, cos_sin, rotate

FAR = [0, 1, 2047, 2048, 4_194_303, 4_194_304, 16_000_000, 2**31 - 2, 2**31 - 1]
PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")


def exact_angles(positions: list[int], rope: Rope) -> np.ndarray:
    """Angles in (-pi, pi], from 70 digits."""
    with decimal.localcontext() as context:
        context.prec = 70
        angles = []
        for position in positions:
            for pair in range(rope.head_dim // 2):
                exponent = decimal.Decimal(-2 * pair) / rope.head_dim
                angle = position * decimal.Decimal(rope.theta) ** exponent % (2 * PI)
                angles.append(float(angle - 2 * PI if angle > PI else angle))
    return np.array(angles).reshape(len(positions), -1)


def largest_error(positions: list[int], rope: Rope, dtype: type) -> float:
    cos, sin = cos_sin(jnp.array(positions, jnp.int32), rope, dtype)
    assert cos.dtype == dtype and cos.shape == (len(positions), rope.head_dim // 2)
    cos, sin = np.asarray(cos, np.float64), np.asarray(sin, np.float64)
    np.testing.assert_allclose(np.hypot(cos, sin), 1, rtol=1e-6)
    exact = exact_angles(positions, rope)
    # The angle between the two unit vectors, free of the jump at pi.
    return float(np.abs(np.sin(np.arctan2(sin, cos) - exact)).max())


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_are_exact_at_every_position(theta: float) -> None:
    assert largest_error(FAR, Rope(head_dim=22, theta=theta), jnp.float32) < 1e-6


def test_float64_angles_are_exact_at_every_position(x64: None) -> None:
    assert largest_error(FAR, Rope(head_dim=22), jnp.float64) < 1e-11


def naive(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    angle = (positions[..., None] * frequency)[..., None, :]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def test_equals_the_formula_at_small_positions(x64: None) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 14))
    positions = np.array([[0, 1, 2, 3, 4], [7, 300, 11, 2049, 4096]], np.int32)
    got = rotate(jnp.asarray(x), jnp.asarray(positions), Rope(14, theta=1000.0))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, naive(x, positions, 1000.0), rtol=0, atol=1e-11)


def test_one_row_of_positions_and_more_batch_dimensions() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 7, 6))
    rope = Rope(6)
    positions = jnp.arange(5) + 11
    whole = rotate(x, positions, rope)
    np.testing.assert_array_equal(whole[2, 1], rotate(x[2, 1], positions, rope))
    rows = jnp.broadcast_to(positions, (2, 5))
    np.testing.assert_array_equal(whole[1], rotate(x[1], rows, rope))


@pytest.mark.parametrize("shift", [1, 5000, 16_000_000, 2**31 - 100])
def test_scores_depend_on_the_distance_only(shift: int) -> None:
    rope = Rope(head_dim=34)
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 34))

    def score(query_position: int, key_position: int) -> float:
        turned = [
            rotate(x, jnp.array([p], jnp.int32), rope)
            for x, p in ((query, query_position), (key, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(score(71, 13) - score(71, 14)) > 1e-3
    assert score(71 + shift, 13 + shift) == pytest.approx(score(71, 13), abs=3e-5)


def test_padding_is_finite_and_negative_positions_turn_back() -> None:
    x = jax.random.normal(jax.random.key(2), (1, 3, 2, 10))
    rope = Rope(10)
    forth = rotate(x, jnp.array([1, 4000, 77]), rope)
    assert bool(jnp.isfinite(rotate(x, jnp.full((1, 3), -1), rope)).all())
    back = rotate(forth, jnp.array([-1, -4000, -77]), rope)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_dtype_is_kept_and_arithmetic_is_wide() -> None:
    x = jax.random.normal(jax.random.key(3), (2, 5, 3, 16)).astype(jnp.bfloat16)
    positions = jnp.arange(5) + 1_000_003
    got = rotate(x, positions, Rope(16))
    assert got.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.float32), positions, Rope(16))
    np.testing.assert_array_equal(got, wide.astype(jnp.bfloat16))


def test_gradient_is_the_rotation_back() -> None:
    x, cotangent = jax.random.normal(jax.random.key(4), (2, 1, 3, 2, 6))
    positions, rope = jnp.array([3, 9, 2**30]), Rope(6)
    _, pull = jax.vjp(lambda x: rotate(x, positions, rope), x)
    np.testing.assert_allclose(pull(cotangent)[0], rotate(cotangent, -positions, rope), atol=1e-6)


def test_tables_are_made_once() -> None:
    rope = Rope(12, theta=777.0)
    before = rope_ops._tables.cache_info().misses
    for length in (3, 5):
        rotate(jnp.ones((1, length, 2, 12)), jnp.arange(length), rope)
    rotate(jnp.ones((1, 3, 2, 12)), jnp.arange(3), Rope(12, theta=777.0))
    assert rope_ops._tables.cache_info().misses == before + 1


def test_a_deep_program_holds_the_tables_once() -> None:
    rope = Rope(8)

    def deep(x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = rotate(x, jnp.arange(5), rope)
        return x

    one = jax.jit(lambda x: rotate(x, jnp.arange(5), rope)).lower(jnp.ones((2, 5, 3, 8))).as_text()
    four = jax.jit(deep).lower(jnp.ones((2, 5, 3, 8))).as_text()
    assert len(four) < 1.2 * len(one)


@pytest.mark.parametrize("arguments", [{"head_dim": 7}, {"head_dim": 0}, {"head_dim": -2}])
def test_an_odd_head_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="head_dim: expected a positive even number, got"):
        Rope(**arguments)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_base_is_refused(theta: float) -> None:
    with pytest.raises(ValueError, match="theta: expected a positive finite number"):
        Rope(4, theta=theta)


def test_arrays_that_do_not_fit_are_refused() -> None:
    x = jnp.ones((2, 5, 3, 8))
    with pytest.raises(ValueError, match="rope: expected head_dim 8 as in x, got 6"):
        rotate(x, jnp.arange(5), Rope(6))
    with pytest.raises(
        ValueError, match=r"positions: expected a shape that broadcasts to \(2, 5\)"
    ):
        rotate(x, jnp.zeros((3, 5), jnp.int32), Rope(8))
