"""The rectified family: softpick, and the ablations of its paper."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import RectifiedOnly, ScaledSoftpick, Softpick

weights = jax.jit(normalizers.weights, static_argnums=0)

ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])


def softpick(x, epsilon):
    excess = [v.exp() - 1 for v in x]
    return [max(e, Decimal(0)) / (sum(map(abs, excess)) + epsilon) for e in excess]


def relu_softmax(x, epsilon):
    positive = [max(v.exp() - 1, Decimal(0)) for v in x]
    return [p / (sum(positive) + epsilon) for p in positive]


def rectified_only(x):
    terms = [v.exp() if v >= 0 else Decimal(0) for v in x]
    return [t / (sum(terms) or 1) for t in terms]


FORMULAS = {
    "softpick": softpick,
    "softpick(epsilon=0.5)": softpick,
    "rectified_only": rectified_only,
    "relu_softmax": relu_softmax,
    "relu_softmax(epsilon=0.5)": relu_softmax,
    "scaled_softpick": lambda x, scale, epsilon: softpick(
        [scale * Decimal(len(x) + 1).ln() * v for v in x], epsilon
    ),
}


def test_formulas(agree):
    agree(FORMULAS)


def test_hidden_keys_stay_out_of_the_denominator_of_softpick():
    """Unlike exp(-inf) - 1 = -1 would."""
    hidden = weights(Softpick(), ROW, HERE)[0].sum()
    assert hidden > weights(Softpick(), ROW.at[3].set(-50.0), jnp.ones(5, bool))[0].sum()


def test_softpick_survives_where_the_published_shift_overflows():
    """Row maximum −110: with m = max x, e^−m is inf in float32 (reference/kernels.md §2.4)."""
    got, slope = jax.value_and_grad(lambda x: weights(Softpick(), x, HERE)[0].sum())(ROW - 110)
    assert got == 0 and np.isfinite(slope).all()
    tiny, _ = weights(Softpick(), jnp.array([1e-3, -2e-3]), jnp.ones(2, bool))
    np.testing.assert_allclose(
        tiny, [np.expm1(1e-3) / (np.expm1(1e-3) - np.expm1(-2e-3)), 0], rtol=1e-5
    )


def test_a_logit_of_zero_counts_for_rectified_only_and_not_for_the_others():
    zero = jnp.zeros(3)
    np.testing.assert_allclose(weights(RectifiedOnly(), zero, zero == 0)[0], 1 / 3, rtol=1e-6)
    assert (weights(Softpick(), zero, zero == 0)[0] == 0).all()


def test_scaled_softpick_does_not_depend_on_hidden_keys():
    short, _ = weights(ScaledSoftpick(), ROW[:3], HERE[:3])
    long, _ = weights(ScaledSoftpick(), ROW, HERE & (jnp.arange(5) < 3))
    np.testing.assert_allclose(long[:3], short, rtol=1e-6)
