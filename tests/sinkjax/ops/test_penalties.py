"""Penalties against float64 NumPy, and against what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import penalties
from sinkjax.ops.attention import dot_product_attention

B, T, D = 3, 5, 7


@pytest.fixture
def hidden() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, T, D)) * 4


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.random.default_rng(1).integers(0, 2, (B, T)).astype(bool)
    assert 0 < mask.sum() < B * T
    return mask


def test_formulas(hidden: np.ndarray, mask: np.ndarray) -> None:
    x, anchor = jnp.asarray(hidden, jnp.float32), jnp.asarray(hidden[:, ::-1], jnp.float32)
    lse = np.log(np.exp(np.abs(hidden)).sum(-1))
    power = ((np.abs(hidden) / 3) ** 4).mean(-1)
    dot = (hidden * hidden[:, ::-1]).sum(-1)
    cosine = dot / np.linalg.norm(hidden, axis=-1) / np.linalg.norm(hidden[:, ::-1], axis=-1)
    for got, want in [
        (penalties.hidden_z_loss, lse**2),
        (penalties.tweo, power),
        (lambda x, m=None: penalties.decorrelation(x, anchor, m), cosine**2),
    ]:
        np.testing.assert_allclose(got(x), want.mean(), rtol=1e-5)
        np.testing.assert_allclose(got(x, jnp.asarray(mask)), want[mask].mean(), rtol=1e-5)
        # What is masked out does not matter, whatever it is; nothing at all gives 0.
        wild = jnp.where(mask[..., None], x, jnp.nan)
        np.testing.assert_allclose(got(wild, jnp.asarray(mask)), want[mask].mean(), rtol=1e-5)
        assert got(x, jnp.zeros((B, T), bool)) == 0
    np.testing.assert_allclose(
        penalties.tweo(x, scale=1.5, power=3), ((np.abs(hidden) / 1.5) ** 3).mean(), rtol=1e-5
    )


def test_massive_activations_get_the_gradient(hidden: np.ndarray) -> None:
    x = jnp.asarray(np.clip(hidden, -2, 2), jnp.bfloat16).at[1, 2, 3].set(-3000)
    for penalty in (penalties.hidden_z_loss, penalties.tweo):
        value, gradient = jax.value_and_grad(penalty)(x)
        assert value.dtype == jnp.float32 and np.isfinite(value)
        size = np.abs(np.asarray(gradient, np.float32))
        assert size[1, 2, 3] > 20 * np.delete(size.ravel(), (1 * T + 2) * D + 3).max()
        assert gradient[1, 2, 3] < 0  # a step down makes it smaller


def test_decorrelation_knows_directions_only(hidden: np.ndarray) -> None:
    x = jnp.asarray(hidden, jnp.float32)
    first = jnp.broadcast_to(x[:, :1], x.shape)
    assert penalties.decorrelation(-300 * first, first) == pytest.approx(1, rel=1e-5)
    assert penalties.decorrelation(x * 0, first) == 0
    scale = jnp.arange(1.0, T + 1)[:, None] * 1e6
    want = penalties.decorrelation(x, first)
    np.testing.assert_allclose(penalties.decorrelation(x * scale, first), want, rtol=1e-5)
    gradient = jax.grad(lambda x: penalties.decorrelation(x, first))(x.at[0, 0].set(0.0))
    assert np.isfinite(gradient).all()


def test_head_balance_is_the_squared_variation_of_the_routed_heads() -> None:
    rng = np.random.default_rng(2)
    fraction = rng.uniform(size=(B, T, 6)) * np.array([0.9, 0.1, 0.4, 0.2, 0.5, 0.3])
    keep = rng.integers(0, 2, (B, T)).astype(bool)
    use = fraction[keep].mean(0)
    got = penalties.head_balance(jnp.asarray(fraction), jnp.asarray(keep))
    np.testing.assert_allclose(got, 6 * (use.std() / use.mean()) ** 2, rtol=1e-5)
    routed = np.sort(use)[:-2]
    got = penalties.head_balance(jnp.asarray(fraction), jnp.asarray(keep), num_shared=2)
    np.testing.assert_allclose(got, 4 * (routed.std() / routed.mean()) ** 2, rtol=1e-5)
    assert penalties.head_balance(jnp.full((T, 6), 0.3)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="num_shared: expected 0 to 4 of 6 heads, got 5"):
        penalties.head_balance(jnp.ones((T, 6)), num_shared=5)


def test_the_open_fraction_comes_from_the_residual() -> None:
    """As the docstring says: one minus the sink's weight, without the matrix of weights."""
    rng = np.random.default_rng(3)
    query, key = (jnp.asarray(rng.normal(size=(B, T, 2, 11)), jnp.float32) for _ in range(2))
    sinks = jnp.asarray([0.7, -1.2])
    _, lse = dot_product_attention(
        query,
        key,
        key,
        is_causal=True,
        sinks=sinks,
        return_residual=True,
        implementation="reference",
    )
    logits = np.einsum("BTNH,BSNH->BTSN", query, key) / 11**0.5
    mass = np.where(np.tri(T, dtype=bool)[None, :, :, None], np.exp(logits), 0).sum(2)
    want = mass / (mass + np.exp(np.asarray(sinks)))
    np.testing.assert_allclose(1 - jnp.exp(sinks - lse), want, rtol=1e-4)


def test_which_tokens_count() -> None:
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0, 0], [-1, -1, 0, 1, 2, 3, 4]])
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    found = penalties.segments((2, 7), positions, ids)
    assert found.tolist() == [[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert penalties.first_tokens(found)[0, :5].tolist() == [0, 0, 0, 3, 3]
    assert penalties.first_tokens(found)[1, 2:].tolist() == [2] * 5
    assert penalties.counted("tweo", found).sum() == 10
    others = [[False, True, True, False, True, False, False], [False] * 3 + [True] * 4]
    assert penalties.counted("decorrelation", found).tolist() == others
    assert penalties.segments((2, 3), None, None).tolist() == [[1] * 3] * 2


def test_impossible_constants_are_refused(hidden: np.ndarray) -> None:
    x = jnp.asarray(hidden, jnp.float32)
    with pytest.raises(ValueError, match="scale: expected more than 0, got 0"):
        penalties.tweo(x, scale=0.0)
    with pytest.raises(ValueError, match="power: expected at least 1, got 0"):
        penalties.tweo(x, power=0)
