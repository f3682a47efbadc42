"""The sparse family: exact thresholds from sorted logits, and the conditions that define entmax."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax._compat import enable_x64
from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import Entmax, Entmax15, Softmax, Sparsemax

weights = jax.jit(normalizers.weights, static_argnums=0)


def sparsemax(x):
    """τ = (sum of the k largest − 1) / k for the largest k whose k-th logit stays above it."""
    ordered = sorted(x, reverse=True)
    for k in range(len(x), 0, -1):
        threshold = (sum(ordered[:k]) - 1) / k
        if ordered[k - 1] > threshold:
            return [max(v - threshold, Decimal(0)) for v in x]


def entmax15(x):
    """(x/2 − τ)² summed over the k largest is 1: a quadratic in τ, its smaller root."""
    halves = [v / 2 for v in x]
    ordered = sorted(halves, reverse=True)
    for k in range(len(x), 0, -1):
        mean = sum(ordered[:k]) / k
        spread = sum((v - mean) ** 2 for v in ordered[:k])
        if spread <= 1:
            threshold = mean - ((1 - spread) / k).sqrt()
            if ordered[k - 1] > threshold:
                return [max(v - threshold, Decimal(0)) ** 2 for v in halves]


FORMULAS = {
    "sparsemax": lambda x: sparsemax(x),
    "entmax15": lambda x: entmax15(x),
    "entmax(alpha=2.0)": lambda x, alpha: sparsemax(x),
    "entmax": lambda x, alpha: entmax15(x),
}


def test_formulas(agree):
    agree(FORMULAS)


def test_entmax_of_any_alpha_meets_its_conditions():
    """Sum one; w^(α − 1) = (α − 1) x − τ on the support, and (α − 1) x ≤ τ off it."""
    alpha = 1.3
    with enable_x64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)) * 4)
        w = np.asarray(weights(Entmax(alpha), x, x < 6)[0])
    where, scaled = np.asarray(x) < 6, (alpha - 1) * np.asarray(x)
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-12)
    support = w > 0
    assert (support.sum(-1) < where.sum(-1)).any() and (w[~where] == 0).all()
    for n in range(6):
        threshold = scaled[n] - w[n] ** (alpha - 1)
        tau = threshold[support[n]]
        np.testing.assert_allclose(tau, tau[0], rtol=1e-9, atol=1e-9)
        assert (scaled[n][where[n] & ~support[n]] <= tau[0] + 1e-9).all()


def test_entmax_has_the_derivative_of_its_differences():
    with enable_x64():
        rng = np.random.default_rng(1)
        x, c = jnp.asarray(rng.normal(size=9)), jnp.asarray(rng.normal(size=9))

        def loss(x):
            return (weights(Entmax(1.3), x, jnp.arange(9) != 4)[0] * c).sum()

        slope, run = jax.grad(loss)(x), jax.jit(loss)
        for j in range(9):
            step = 1e-6 * (jnp.arange(9) == j)
            numeric = (run(x + step) - run(x - step)) / 2e-6
            np.testing.assert_allclose(slope[j], numeric, rtol=1e-6, atol=1e-9)


def test_entmax_lies_between_softmax_and_sparsemax():
    x, where = jnp.array([0.4, -0.3, 0.9, -2.0]), jnp.ones(4, bool)
    near, _ = weights(Entmax(1.001), x, where)
    np.testing.assert_allclose(near, weights(Softmax(), x, where)[0], atol=2e-3)
    tops = [
        float(weights(n, x, where)[0].max()) for n in (Softmax(), Entmax15(), Sparsemax())
    ]  # fmt: skip
    assert tops == sorted(tops) and tops[0] < tops[2]


def test_long_rows_sum_to_one():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4096)), jnp.float32)
    for description in (Sparsemax(), Entmax15(), Entmax(1.2)):
        w, _ = weights(description, x, jnp.ones(4096, bool))
        np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-5)
        assert (w >= 0).all()
