"""The two-pass family: ssmax, clipped and elastic softmax."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import ClippedSoftmax, ElasticSoftmax

weights = jax.jit(normalizers.weights, static_argnums=0)

ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])


def softmax(x):
    terms = [v.exp() for v in x]
    return [t / sum(terms) for t in terms]


def clip(v):
    return min(max(v, Decimal(0)), Decimal(1))


def clipped(x, gamma, alpha, zeta):
    gamma = gamma if alpha is None else -alpha / len(x)
    return [clip((zeta - gamma) * p + gamma) for p in softmax(x)]


def normalized_clipped(x, alpha):
    kept = clipped(x, None, alpha, Decimal(1))
    return [c / (sum(kept) or 1) for c in kept]


FORMULAS = {
    # n^(s x) over the sum of n^(s x), as printed
    "ssmax": lambda x, scale: softmax([scale * Decimal(len(x)).ln() * v for v in x]),
    "ssmax(scale=0.5)": lambda x, scale: softmax([scale * Decimal(len(x)).ln() * v for v in x]),
    "clipped_softmax": clipped,
    "clipped_softmax(gamma=-0.03)": clipped,
    "clipped_softmax(gamma=-0.1, zeta=1.25)": clipped,
    "normalized_clipped_softmax": normalized_clipped,
    "elastic_softmax": lambda x, offset: [
        max(p + offset / len(x), Decimal(0)) for p in softmax(x)
    ],
    "elastic_softmax(offset=0.5)": lambda x, offset: [p + offset / len(x) for p in softmax(x)],
}  # fmt: skip


def test_formulas(agree):
    agree(FORMULAS)


def test_an_offset_above_zero_does_not_leak_to_hidden_keys():
    got, _ = weights(ElasticSoftmax(0.5), ROW, HERE)
    assert got[3] == 0 and got.sum() > 1
    hidden, _ = weights(ElasticSoftmax(0.5), ROW, HERE & False)
    assert (hidden == 0).all()


def test_an_even_row_gives_nothing_at_offset_minus_one():
    for n in (1, 2, 4):
        got, _ = weights(ElasticSoftmax(), jnp.zeros(4), jnp.arange(4) < n)
        assert (got == 0).all()


def test_clipping_stops_the_gradient():
    def first(x):
        return weights(ClippedSoftmax(gamma=-0.1), x, jnp.ones(3, bool))[0][0]

    value, slope = jax.value_and_grad(first)(jnp.array([-4.0, 1.0, 1.0]))
    assert value == 0 and (slope == 0).all()


def test_gamma_or_alpha():
    assert str(ClippedSoftmax()) == "clipped_softmax(alpha=2.0)"
    with pytest.raises(ValueError, match="expected gamma or alpha, got both"):
        normalizers.resolve("clipped_softmax(gamma=-0.1, alpha=2.0)")
    long, _ = weights(ClippedSoftmax(alpha=0.4), jnp.zeros(8), jnp.arange(8) < 4)
    short, _ = weights(ClippedSoftmax(gamma=-0.1), jnp.zeros(4), jnp.ones(4, bool))
    np.testing.assert_allclose(long[:4], short, rtol=1e-6)
