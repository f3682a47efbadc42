import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sinkjax.ops.losses import cross_entropy, token_nll

B, T, V = 3, 5, 11


@pytest.fixture
def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(B, T, V)) * 4, jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.int32)
    assert 0 < int(mask.sum()) < B * T
    return logits, targets, mask


def test_value_and_gradient_equal_optax(batch: tuple) -> None:
    logits, targets, mask = batch

    def expected(logits: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * mask).sum() / mask.sum()

    got = jax.value_and_grad(lambda x: cross_entropy(x, targets, mask)[0])(logits)
    want = jax.value_and_grad(expected)(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_z_loss_equals_the_formula(batch: tuple) -> None:
    logits, targets, mask = batch
    lse = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(targets)[..., None], -1)[..., 0]
    weight = np.asarray(mask) / np.asarray(mask).sum()
    loss, aux = cross_entropy(logits, targets, mask, z_loss=0.25)
    np.testing.assert_allclose(aux["nll"], ((lse - chosen) * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["z_loss"], (0.25 * lse**2 * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, aux["nll"] + aux["z_loss"], rtol=1e-6)
    assert float(aux["tokens"]) == int(mask.sum())


def test_z_loss_pulls_the_partition_to_one(batch: tuple) -> None:
    logits, targets, mask = batch
    shifted = logits + 7
    plain = jax.grad(lambda x: cross_entropy(x, targets, mask)[0])(shifted)
    pulled = jax.grad(lambda x: cross_entropy(x, targets, mask, z_loss=0.1)[0])(shifted)
    assert abs(float(plain.sum())) < 1e-5
    assert float(pulled.sum()) > 1


def test_without_a_mask_every_token_counts(batch: tuple) -> None:
    logits, targets, _ = batch
    loss, aux = cross_entropy(logits, targets)
    np.testing.assert_allclose(loss, token_nll(logits, targets).mean(), rtol=1e-6)
    assert float(aux["tokens"]) == B * T


def test_weights_are_weights(batch: tuple) -> None:
    logits, targets, mask = batch
    half = cross_entropy(logits, targets, mask * 0.01)[0]
    np.testing.assert_allclose(half, cross_entropy(logits, targets, mask)[0], rtol=1e-5)
    boolean = cross_entropy(logits, targets, mask.astype(bool))[0]
    np.testing.assert_array_equal(boolean, cross_entropy(logits, targets, mask)[0])


def test_masked_targets_may_be_anything(batch: tuple) -> None:
    logits, targets, mask = batch
    wild = jnp.where(mask == 1, targets, V + 1000)
    function = jax.value_and_grad(lambda x, t: cross_entropy(x, t, mask)[0])
    jax.tree.map(np.testing.assert_array_equal, function(logits, wild), function(logits, targets))


def test_a_target_outside_the_vocabulary_is_loud(batch: tuple) -> None:
    logits, targets, _ = batch
    assert np.isnan(token_nll(logits, targets.at[1, 2].set(V))[1, 2])


def test_nothing_to_learn_from_gives_zero(batch: tuple) -> None:
    logits, targets, mask = batch
    value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, targets, mask * 0, 0.1)[0])(
        logits
    )
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_logits_are_reduced_in_float32(batch: tuple) -> None:
    logits, targets, mask = batch
    narrow = logits.astype(jnp.bfloat16)
    loss = cross_entropy(narrow, targets, mask)[0]
    assert loss.dtype == jnp.float32
    wide = cross_entropy(narrow.astype(jnp.float32), targets, mask)[0]
    np.testing.assert_array_equal(loss, wide)


def test_float64_stays_float64(x64: None) -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7)) * 30)
    got = token_nll(logits, jnp.array([3, 0]))
    assert got.dtype == jnp.float64
    exact = np.log(np.exp(np.asarray(logits)).sum(-1)) - np.asarray(logits)[[0, 1], [3, 0]]
    np.testing.assert_allclose(got, exact, rtol=1e-13)


def test_a_negative_z_loss_is_refused(batch: tuple) -> None:
    logits, targets, _ = batch
    with pytest.raises(ValueError, match="z_loss: expected at least 0, got -1"):
        cross_entropy(logits, targets, z_loss=-1.0)
