"""Outlier formulas: each published kurtosis, massive activations, spectra."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import outliers

B, T, D = 3, 7, 13


def gaussian(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_gaussian_has_the_kurtosis_each_definition_promises():
    x = gaussian((5, 101, 1009)) * 3 + 0.0
    np.testing.assert_allclose(outliers.kurtosis_bondarenko(x), 3.0, atol=0.1)
    # the rectifier keeps only the positive half of the sampling noise of a token
    np.testing.assert_allclose(outliers.kurtosis_osp(x), 0.0, atol=0.12)
    assert outliers.kurtosis_pooled(x) == pytest.approx(3.0, abs=0.05)
    assert outliers.kurtosis_pooled(x, excess=True) == pytest.approx(0.0, abs=0.05)


def test_the_three_kurtoses_against_float64_formulas():
    x = np.random.default_rng(2).normal(size=(B, T, D)) + 0.7
    x[1, 0, 4] = 30.0
    flat = x.reshape(B, -1)
    mu = flat.mean(1, keepdims=True)
    bondarenko = ((flat - mu) ** 4).mean(1) / (flat.std(1, ddof=1) ** 4 + 1e-6)
    osp = np.maximum((x**4).mean(-1) / x.std(-1, ddof=1) ** 4 - 3, 0).mean(-1)
    pooled = ((x - x.mean()) ** 4).mean() / x.var() ** 2
    got = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(outliers.kurtosis_bondarenko(got), bondarenko, rtol=1e-4)
    np.testing.assert_allclose(outliers.kurtosis_osp(got), osp, rtol=1e-4)
    assert outliers.kurtosis_pooled(got) == pytest.approx(pooled, rel=1e-4)


def test_only_the_osp_numerator_is_not_centred():
    x = gaussian((1, 5, 4001))
    far = x + 10.0
    np.testing.assert_allclose(
        outliers.kurtosis_bondarenko(far), outliers.kurtosis_bondarenko(x), rtol=1e-2
    )
    assert outliers.kurtosis_osp(far)[0] > 9000  # E[(x+10)^4] = 10603


def test_kurtosis_osp_leaves_padding_out_and_survives_a_constant_token():
    x = gaussian((2, 5, 401)).at[:, 3, 7].set(500.0).at[:, 1].set(2.0)
    keep = jnp.arange(5) != 3
    assert outliers.kurtosis_osp(x)[0] > 20
    assert outliers.kurtosis_osp(x, keep)[0] < 1


def test_massive_activations_need_both_bounds():
    x = jnp.full((T, D), 0.1).at[0, 5].set(101.0).at[2, 3].set(-250.0).at[1, 1].set(99.0)
    found = outliers.massive_activations(x)
    assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(np.asarray(found))), strict=True)) == [
        (0, 5),
        (2, 3),
    ]
    big_median = jnp.full((T, D), 10.0).at[0, 5].set(9999.0)
    assert not outliers.massive_activations(big_median).any()
    assert outliers.massive_activations(big_median.at[0, 5].set(10001.0)).sum() == 1
    # the median is that of the sample's own hidden state
    both = jnp.stack([x, big_median])
    np.testing.assert_array_equal(outliers.massive_activations(both).sum((1, 2)), [2, 0])


def test_the_reduced_arrays_give_psi_and_spikes():
    x = np.random.default_rng(3).normal(size=(2, T, D))
    x[1, 0, 5], x[1, 2, 3], x[1, 4, 4] = -2000.0, 150.0, 30.0
    reduced = outliers.from_hidden(jnp.asarray(x, jnp.float32))
    ordered = np.sort(np.abs(x).reshape(2, -1), -1)[:, ::-1]
    median = np.median(np.abs(x).reshape(2, -1), -1)
    np.testing.assert_allclose(reduced["top"], ordered[:, :3], rtol=1e-6)
    np.testing.assert_allclose(reduced["median"], median, rtol=1e-6)
    np.testing.assert_allclose(reduced["norm"], np.linalg.norm(x, axis=-1), rtol=1e-6)
    top, middle = reduced["top"], reduced["median"]
    np.testing.assert_allclose(outliers.psi(top, middle), ordered[:, 0] / median, rtol=1e-5)
    ratios = outliers.top_over_median(top, middle)
    np.testing.assert_allclose(ratios, ordered[:, :3] / median[:, None], rtol=1e-5)
    np.testing.assert_array_equal(outliers.is_spike(top, middle), [False, True])


def test_psi_over_a_zero_median():
    zeros = jnp.zeros(2)
    np.testing.assert_array_equal(
        outliers.psi(jnp.array([[3.0, 0, 0], [0.0, 0, 0]]), zeros), [np.inf, 0.0]
    )


def test_max_inf_norm_averages_samples_before_the_maximum_over_modules():
    x = jnp.zeros((2, 2, T, D)).at[0, 0, 1, 1].set(-9.0).at[1, :, 3, 3].set(5.0)
    assert outliers.max_inf_norm(x) == 5.0  # (9 + 0) / 2 < (5 + 5) / 2


@pytest.mark.parametrize("shape", [(T, D), (D, T)])
def test_matrix_entropy_and_anisotropy(shape):
    x = np.random.default_rng(4).normal(size=(2, *shape))
    spectrum = np.linalg.svd(x, compute_uv=False) ** 2
    share = spectrum / spectrum.sum(-1, keepdims=True)
    got = jnp.asarray(x, jnp.float32)
    entropy = -(share * np.log(share)).sum(-1)
    np.testing.assert_allclose(outliers.matrix_entropy(got), entropy, rtol=1e-4)
    np.testing.assert_allclose(outliers.anisotropy(got), share[:, 0], rtol=1e-4)


def test_matrix_entropy_at_its_bounds():
    assert outliers.matrix_entropy(jnp.eye(T)) == pytest.approx(math.log(T), rel=1e-5)
    one_row = jnp.zeros((T, D)).at[0].set(7.0)
    assert outliers.matrix_entropy(one_row) == pytest.approx(0.0, abs=1e-4)
    assert outliers.anisotropy(one_row) == pytest.approx(1.0, rel=1e-5)


def test_outlier_tokens_by_threshold_and_by_three_sigma():
    norms = jnp.ones((2, 100)).at[0, 3].set(200.0).at[1, 4].set(140.0)
    np.testing.assert_allclose(outliers.outlier_token_rate(norms, 150.0), [0.01, 0.0])
    np.testing.assert_allclose(outliers.outlier_token_rate(norms), [0.01, 0.01])
