"""The chunked loss is the whole one; `tests/devices/test_head_loss_devices.py` has the meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.head_loss import head_cross_entropy
from sinkjax.ops.losses import cross_entropy

B, T, D, V = 3, 7, 5, 37


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = rng.integers(0, 2, (B, T)) * rng.uniform(0.5, 2, (B, T))
    return hidden, kernel, targets, jnp.asarray(weights, jnp.float32)


def _whole(hidden, kernel, targets, mask, z_loss):
    return cross_entropy(jnp.einsum("BTD,DV->BTV", hidden, kernel), targets, mask, z_loss)


def _gradients(loss, *operands):
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*operands)


@pytest.mark.parametrize("chunks", [4, 30])  # of 21 tokens: one padded, some empty
def test_value_and_gradients_are_those_of_whole_logits(operands, chunks):
    hidden, kernel, targets, mask = operands

    def chunked(hidden, kernel):
        return head_cross_entropy(hidden, kernel, targets, mask, 0.01, chunks=chunks)

    got = _gradients(chunked, hidden, kernel)
    want = _gradients(lambda h, w: _whole(h, w, targets, mask, 0.01), hidden, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
    assert 0 < float(got[0][1]["z_loss"]) < float(got[0][0])
    if chunks == 4:  # without a gradient it takes another way
        only = jax.jit(chunked)(hidden, kernel)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), only, got[0])


def test_the_gradient_of_the_head_is_added_up_in_float32():
    # In bfloat16 a sum of 2 ** -9 at a time would stand still at 1.
    T, V = 4096, 3
    hidden = jnp.ones((1, T, 1), jnp.bfloat16)
    kernel = jnp.zeros((1, V), jnp.float32)
    targets = jnp.zeros((1, T), jnp.int32)

    def loss(kernel):
        mean, _ = head_cross_entropy(hidden, kernel, targets, chunks=T // 4)
        return mean * T

    got = jax.jit(jax.grad(loss))(kernel)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[T * (1 / 3 - 1), T / 3, T / 3]], rtol=4e-3)


def test_half_precision_products_stay_near(operands):
    hidden, kernel, targets, mask = operands

    def chunked(hidden, kernel):
        return head_cross_entropy(hidden, kernel, targets, mask, chunks=2, dtype="bfloat16")

    got = _gradients(chunked, hidden.astype(jnp.bfloat16), kernel)
    want = _gradients(lambda h, w: _whole(h, w, targets, mask, 0.0), hidden, kernel)
    assert got[1][0].dtype == jnp.bfloat16 and got[1][1].dtype == jnp.float32
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.03, atol=0.02),
        got,
        want,
    )


def test_nothing_masked_in_gives_zero_and_an_unknown_target_nan(operands):
    hidden, kernel, targets, mask = operands
    wrong = targets.at[0, 0].set(V)
    chosen = jnp.zeros_like(mask).at[0, 0].set(1)
    run = jax.jit(lambda mask: head_cross_entropy(hidden, kernel, wrong, mask, chunks=2))
    nothing = run(0 * mask)
    assert float(nothing[0]) == 0 and float(nothing[1]["tokens"]) == 0
    assert np.isnan(run(chosen)[0])
    assert np.isfinite(run(1 - chosen)[0])


def test_bad_input_is_named(operands):
    hidden, kernel, targets, mask = operands
    with pytest.raises(ValueError, match="chunks: expected at least 1, got 0"):
        head_cross_entropy(hidden, kernel, targets, mask, chunks=0)
    with pytest.raises(ValueError, match="z_loss: expected at least 0, got -1"):
        head_cross_entropy(hidden, kernel, targets, mask, -1.0, chunks=1)
