"""The elementwise family and its normalised forms."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import Sigmoid

weights = jax.jit(normalizers.weights, static_argnums=0)

ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])
TINY = Decimal("1e-8")  # of the released code


def sigmoid(v):
    return 1 / (1 + (-v).exp())


def shares(terms, more=Decimal(0)):
    return [t / (sum(terms) + more) for t in terms]


def relu(x, normalized, by_length, divisor):
    terms = [max(v, Decimal(0)) / divisor for v in x]
    return shares(terms, TINY) if normalized else [t / (len(x) if by_length else 1) for t in terms]


FORMULAS = {
    "sigmoid": lambda x, bias, normalized: [sigmoid(v + bias) for v in x],
    "sigmoid(bias=-3.5)": lambda x, bias, normalized: [sigmoid(v + bias) for v in x],
    "sigmoid(normalized=True)": lambda x, bias, normalized: shares([sigmoid(v + bias) for v in x]),
    "relu": relu,
    "relu(divisor=3.0)": relu,
    "relu(by_length=True)": relu,
    "relu(normalized=True)": relu,
    "elu": lambda x, normalized: x,
    "elu(normalized=True)": lambda x, normalized: shares(x, TINY),
    "identity": lambda x, normalized: x,
    "identity(normalized=True)": lambda x, normalized: [v / max(1, abs(sum(x))) for v in x],
    "consmax": lambda x, shift, divisor: [
        min(v - shift, Decimal(44)).exp() / divisor for v in x
    ],
}  # fmt: skip


def test_formulas(agree):
    agree(FORMULAS)


def test_sigmoid_is_elementwise_and_takes_a_learned_bias():
    got, lse = weights(Sigmoid(-1.0), ROW, HERE)
    np.testing.assert_allclose(got, np.where(HERE, 1 / (1 + np.exp(1 - ROW)), 0), rtol=1e-6)
    assert lse is None
    more, _ = weights(Sigmoid(), ROW, HERE, params={"bias": jnp.asarray(-1.0)})
    np.testing.assert_allclose(more, got, rtol=1e-6)


def test_feature_map_is_elu_plus_one_for_elu_alone():
    x = jnp.array([-1e4, -2.0, 0.0, 3.0, 1e4])
    got = normalizers.feature_map(normalizers.Elu(), x)
    np.testing.assert_allclose(got, [0, np.exp(-2), 1, 4, 1e4 + 1], rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda v: normalizers.feature_map(normalizers.Elu(), v)))(x)
    np.testing.assert_allclose(slope, [0, np.exp(-2), 1, 1, 1], rtol=1e-6)
    assert normalizers.feature_map(normalizers.Softmax(), x) is x
    assert normalizers.feature_map(normalizers.Elu(), x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
