"""The exp-sum family: the formulas, and who is a special case of whom."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import SigSoftmax, Softmax, Softmax1, SoftmaxN

weights = jax.jit(normalizers.weights, static_argnums=0)

ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])


def shares(terms, constant=0):
    return [t / (constant + sum(terms)) for t in terms]


def exps(x):
    return [v.exp() for v in x]


def sign(v):
    return 1 if v > 0 else -1


FORMULAS = {
    "softmax": lambda x: shares(exps(x)),
    "softmax1": lambda x: shares(exps(x), 1),
    "softmax_n(n=2.5)": lambda x, n: shares(exps(x), n),
    "softmax_n(n=0.0)": lambda x, n: shares(exps(x), n),
    "sigsoftmax": lambda x: shares([v.exp() / (1 + (-v).exp()) for v in x]),
    "cog": lambda x: [
        sign(v) * w for v, w in zip(x, shares(exps(map(abs, x))), strict=True)
    ],
}  # fmt: skip


def test_formulas(agree):
    agree(FORMULAS)


def test_softmax_is_jax_nn_softmax():
    got, lse = weights(Softmax(), ROW, HERE)
    np.testing.assert_allclose(got, jax.nn.softmax(ROW, where=HERE), rtol=1e-6)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(ROW[HERE]), rtol=1e-6)


def test_softmax1_is_softmax_with_a_zero_logit_slot():
    got, lse = weights(Softmax1(), ROW, HERE)
    want = jax.nn.softmax(jnp.append(ROW[HERE], 0.0))
    np.testing.assert_allclose(got[HERE], want[:-1], rtol=1e-6)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(jnp.append(ROW[HERE], 0.0)), rtol=1e-6)


def test_softmax1_is_a_sink_logit_of_zero_and_softmax_n_of_log_n():
    for description, sink in [(Softmax1(), 0.0), (SoftmaxN(2.5), np.log(2.5))]:
        got, lse = weights(description, ROW, HERE)
        want, want_lse = weights(Softmax(), ROW, HERE, sinks=jnp.asarray(sink))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    np.testing.assert_allclose(
        weights(SoftmaxN(0.0), ROW, HERE)[0], weights(Softmax(), ROW, HERE)[0]
    )


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_sink_logits_share_the_row(level):
    """A sink logit is a key without a value: its share is what the row lacks, at any height."""
    x, s = ROW + level, jnp.asarray(level + 1.5)
    got, lse = weights(Softmax(), x, HERE, sinks=s)
    np.testing.assert_allclose(got.sum() + jnp.exp(s - lse), 1, rtol=1e-3)
    slope = jax.grad(lambda s: (weights(Softmax(), x, HERE, sinks=s)[0] * ROW).sum())(s)
    np.testing.assert_allclose(slope, -(got * ROW).sum() * jnp.exp(s - lse), rtol=1e-3)


def test_sigsoftmax_has_the_log_sum_exp_of_the_mapped_logits():
    got, lse = weights(SigSoftmax(), ROW, HERE)
    with decimal.localcontext(prec=40):
        x = [decimal.Decimal(float(v)) for v in ROW[HERE]]
        want = sum(v.exp() / (1 + (-v).exp()) for v in x).ln()
    np.testing.assert_allclose(lse, float(want), rtol=1e-6)
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-6)
