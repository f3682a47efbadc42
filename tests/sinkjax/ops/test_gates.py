import jax.numpy as jnp
import numpy as np

from sinkjax.ops.gates import elementwise_gate, headwise_gate

SHAPE = (2, 3, 5, 7)


def sigmoid(x: np.ndarray | np.float64) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


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


def test_the_gate_is_computed_in_float32() -> None:
    out = jnp.full(SHAPE, 3.0, jnp.bfloat16)
    scores = jnp.full(SHAPE, -2.3, jnp.bfloat16)
    got = elementwise_gate(out, scores)
    assert got.dtype == jnp.bfloat16
    expected = jnp.bfloat16(3.0 * sigmoid(np.float64(scores[0, 0, 0, 0])))
    np.testing.assert_array_equal(got, expected)


def test_extreme_scores_close_and_open() -> None:
    out = jnp.ones((1, 1, 2, 3))
    got = headwise_gate(out, jnp.array([[[-1e4, 1e4]]]))
    np.testing.assert_array_equal(got[0, 0], [[0, 0, 0], [1, 1, 1]])
