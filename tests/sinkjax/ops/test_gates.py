import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.gates import (
    apply_gate,
    elementwise_gate,
    gate_score,
    gate_value,
    headwise_gate,
    shared_gate,
)

SHAPE = (2, 3, 5, 7)


def sigmoid(x: np.ndarray | np.float64) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# What a gate of each activation makes of y at score s.
GATED = {
    "sigmoid": lambda y, s: y * sigmoid(s),
    "twice_sigmoid": lambda y, s: y * 2 * sigmoid(s),
    "silu": lambda y, s: y * s * sigmoid(s),
    "additive": lambda y, s: y + sigmoid(s),
}


def test_headwise_gate_scales_whole_heads(x64: None) -> None:
    rng = np.random.default_rng(0)
    out, scores = rng.normal(size=SHAPE), rng.normal(size=SHAPE[:-1]) * 3
    got = headwise_gate(jnp.asarray(out), jnp.asarray(scores))
    np.testing.assert_allclose(got, out * sigmoid(scores)[..., None], rtol=1e-13)


def test_elementwise_gate_scales_channels(x64: None) -> None:
    rng = np.random.default_rng(1)
    out, scores = rng.normal(size=(2, *SHAPE)) * 3
    got = elementwise_gate(jnp.asarray(out), jnp.asarray(scores))
    np.testing.assert_allclose(got, out * sigmoid(scores), rtol=1e-13)


def test_shared_gate_scales_the_channels_of_all_heads_alike(x64: None) -> None:
    rng = np.random.default_rng(2)
    out, scores = rng.normal(size=SHAPE), rng.normal(size=(2, 3, 7)) * 3
    got = shared_gate(jnp.asarray(out), jnp.asarray(scores))
    np.testing.assert_allclose(got, out * sigmoid(scores)[:, :, None], rtol=1e-13)


@pytest.mark.parametrize("activation", GATED)
def test_activations(x64: None, activation: str) -> None:
    rng = np.random.default_rng(3)
    out, scores = rng.normal(size=SHAPE), rng.normal(size=SHAPE) * 3
    heads, channels = scores[..., 0], scores[:, :, 0]
    expected = GATED[activation]
    for gate, given, spread in (
        (elementwise_gate, scores, scores),
        (headwise_gate, heads, heads[..., None]),
        (shared_gate, channels, channels[:, :, None]),
    ):
        got = gate(jnp.asarray(out), jnp.asarray(given), activation)
        np.testing.assert_allclose(got, expected(out, spread), rtol=1e-13, err_msg=str(gate))
    got = apply_gate(jnp.asarray(out), jnp.asarray(scores[0, 0]), activation, divisor=0.25)
    np.testing.assert_allclose(got, expected(out, scores[0, 0]) / 0.25, rtol=1e-13)


def test_the_gate_is_computed_in_float32() -> None:
    out = jnp.full(SHAPE, 3.0, jnp.bfloat16)
    scores = jnp.full(SHAPE, -2.3, jnp.bfloat16)
    got = elementwise_gate(out, scores)
    assert got.dtype == jnp.bfloat16
    expected = jnp.bfloat16(3.0 * sigmoid(np.float64(scores[0, 0, 0, 0])))
    np.testing.assert_array_equal(got, expected)
    assert gate_value(scores).dtype == jnp.float32


@pytest.mark.parametrize("activation", GATED)
def test_extreme_scores_close_and_open(activation: str) -> None:
    out, scores = jnp.full((1, 1, 2, 3), 5.0), jnp.array([[[-1e4, 1e4]]])
    got = headwise_gate(out, scores, activation)[0, 0]
    closed, opened = {
        "sigmoid": (0, 5),
        "twice_sigmoid": (0, 10),
        "silu": (0, 5e4),
        "additive": (5, 6),
    }[activation]
    np.testing.assert_array_equal(got, [[closed] * 3, [opened] * 3])
    total = jax.jit(jax.grad(lambda *a: headwise_gate(*a, activation).sum(), (0, 1)))
    slopes = total(out, scores)
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)


@pytest.mark.parametrize(
    "activation, value", [("sigmoid", 0.25), ("sigmoid", 0.99995), ("twice_sigmoid", 1.7)]
)
def test_gate_score_is_the_inverse(x64: None, activation: str, value: float) -> None:
    score = jnp.asarray(gate_score(value, activation), jnp.float64)
    np.testing.assert_allclose(gate_value(score, activation), value, rtol=1e-14)


def test_a_doubled_sigmoid_is_one_at_zero() -> None:
    np.testing.assert_array_equal(gate_value(jnp.zeros(3), "twice_sigmoid"), 1)
    assert gate_score(1.0, "twice_sigmoid") == 0


def test_what_is_refused() -> None:
    out = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="activation: expected one of sigmoid, .*; got 'relu'"):
        gate_value(jnp.ones(3), "relu")
    with pytest.raises(ValueError, match="value: expected above 0 and below 1 .*, got 1.0"):
        gate_score(1.0)
    with pytest.raises(ValueError, match="value: expected above 0 and below 2 .*, got 0.0"):
        gate_score(0.0, "twice_sigmoid")
    with pytest.raises(ValueError, match="activation: expected sigmoid or .*, got 'silu'"):
        gate_score(0.5, "silu")
    for scores in (jnp.ones((3, 5, 2)), jnp.ones((1, *SHAPE))):
        with pytest.raises(ValueError, match="scores: expected a shape that broadcasts to"):
            apply_gate(out, scores)
    wrong = (elementwise_gate, SHAPE[:-1]), (headwise_gate, (2, 3, 7)), (shared_gate, (2, 3, 5))
    for gate, shape in wrong:
        with pytest.raises(ValueError, match=r"scores: expected shape \(2, 3, .*\), got \(2, 3"):
            gate.__wrapped__(out, jnp.ones(shape))
