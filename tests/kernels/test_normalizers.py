"""Normalisers: published identities, extreme logits, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import Sigmoid, Softmax, Softmax1, SoftmaxN, Softpick, weights

ALL = [Softmax(), Softmax1(), SoftmaxN(2.5), Sigmoid(-1.0), Softpick()]
ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])


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


def test_sigmoid_is_elementwise_and_takes_a_learned_bias():
    got, lse = weights(Sigmoid(-1.0), ROW, HERE)
    np.testing.assert_allclose(got, np.where(HERE, 1 / (1 + np.exp(1 - ROW)), 0), rtol=1e-6)
    assert lse is None
    more, _ = weights(Sigmoid(), ROW, HERE, params={"bias": jnp.asarray(-1.0)})
    np.testing.assert_allclose(more, got, rtol=1e-6)


def test_softpick_is_the_published_formula():
    got, _ = weights(Softpick(), ROW, HERE)
    excess = np.expm1(np.asarray(ROW, np.float64))
    want = np.maximum(excess, 0) / (np.abs(excess)[HERE].sum() + 1e-8)
    np.testing.assert_allclose(got, np.where(HERE, want, 0), rtol=1e-6)
    # Masked keys stay out of the denominator, unlike exp(-inf) - 1 = -1 would.
    assert got.sum() > weights(Softpick(), ROW.at[3].set(-50.0), jnp.ones(5, bool))[0].sum()


def test_softpick_survives_where_the_published_shift_overflows():
    """Row maximum −110: with m = max x, e^−m is inf in float32 (reference/kernels.md §2.4)."""
    got, slope = jax.value_and_grad(lambda x: weights(Softpick(), x, HERE)[0].sum())(ROW - 110)
    assert got == 0 and np.isfinite(slope).all()
    tiny, _ = weights(Softpick(), jnp.array([1e-3, -2e-3]), jnp.ones(2, bool))
    np.testing.assert_allclose(
        tiny, [np.expm1(1e-3) / (np.expm1(1e-3) - np.expm1(-2e-3)), 0], rtol=1e-5
    )


@pytest.mark.parametrize("description", ALL, ids=str)
@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_extreme_logits_stay_finite(description, level):
    def total(x, where):
        w, lse = weights(description, x, where)
        return (w * jnp.arange(5.0)).sum() + (
            0 if lse is None else jnp.where(jnp.isinf(lse), 0, lse)
        )

    for row in (jnp.full(5, level), ROW * 1e4, ROW + level):
        for where in (HERE, HERE & (jnp.arange(5) == 2), jnp.zeros(5, bool)):
            value, slope = jax.value_and_grad(total)(row, where)
            assert np.isfinite(value) and np.isfinite(slope).all(), (row, where)
            w, _ = weights(description, row, where)
            assert (np.asarray(w) >= 0).all() and (np.asarray(w)[~np.asarray(where)] == 0).all()


def test_which_rows_sum_to_one():
    sums = {str(n): float(weights(n, ROW, HERE)[0].sum()) for n in ALL}
    assert sums["softmax"] == pytest.approx(1)
    assert all(
        s < 1 for name, s in sums.items() if name.startswith(("softmax1", "softmax_n", "softpick"))
    )
    assert sums["sigmoid(bias=-1.0)"] > 1


def test_half_precision_is_computed_in_float32():
    got, lse = weights(Softmax(), ROW.astype(jnp.bfloat16), HERE)
    assert got.dtype == lse.dtype == jnp.float32


def test_names_round_trip():
    for description in [*ALL, Softmax(), Sigmoid(), Softpick(epsilon=1e-6)]:
        assert normalizers.resolve(str(description)) == description
    assert normalizers.resolve(Softmax1()) == Softmax1()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "softmax2",
            "expected one of softmax, softmax1, softmax_n, sigmoid, softpick, got 'softmax2'",
        ),
        ("softmax_n(m=2)", "softmax_n takes n, got 'm'"),
        ("softmax(n=2)", "softmax takes no argument, got 'n'"),
        ("sigmoid(bias=low)", "expected name=number, got 'bias=low'"),
        ("softmax_n(n=-1)", "n must be a finite number of at least 0"),
        ("sigmoid(bias=inf)", "bias must be finite"),
        ("softpick(epsilon=-1)", "epsilon must be at least 0"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(ValueError) as error:
        normalizers.resolve(spec)
    assert message in str(error.value)


def test_sinks_and_params_only_where_they_belong():
    with pytest.raises(ValueError, match="only softmax takes sink logits"):
        weights(Softmax1(), ROW, HERE, sinks=jnp.asarray(0.0))
    with pytest.raises(ValueError, match="softmax takes \\[\\], got \\['bias'\\]"):
        weights(Softmax(), ROW, HERE, params={"bias": jnp.asarray(0.0)})
