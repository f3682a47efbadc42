"""Runs of rows times a matrix each: against a loop, with gradients, whatever lies after the last run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import ragged

M, K, N, E = 23, 5, 7, 6


@pytest.fixture(scope="module")
def product():
    def run(x, kernel, bias, sizes, cotangent):
        out, pull = jax.vjp(lambda *a: ragged.ragged_linear(*a[:2], sizes, a[2]), x, kernel, bias)
        return out, pull(cotangent)

    whole, ragged.TILE = ragged.TILE, 4  # rows of one step: runs begin and end inside of steps
    yield jax.jit(run)
    ragged.TILE = whole


@pytest.mark.parametrize(
    "sizes",
    [(3, 0, 9, 4, 1, 0), (0, 0, 23, 0, 0, 0), (1, 2, 3, 4, 5, 8), (0, 4, 4, 8, 0, 5), (0,) * 6],
)
def test_equals_a_loop_over_the_runs(product, sizes):
    rng = np.random.default_rng(sum(sizes))
    shapes = (M, K), (E, K, N), (E, N), (M, N)
    x, kernel, bias, cotangent = (rng.normal(size=s).astype(np.float32) for s in shapes)
    used = sum(sizes)
    x[used:], cotangent[used:] = np.inf, np.nan  # rows of no run
    out, (dx, dkernel, dbias) = product(x, kernel, bias, jnp.asarray(sizes), cotangent)
    want_kernel, want_bias = np.zeros((E, K, N)), np.zeros((E, N))
    for m, run in enumerate(np.repeat(np.arange(E), sizes)):
        np.testing.assert_allclose(out[m], x[m] @ kernel[run] + bias[run], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dx[m], kernel[run] @ cotangent[m], rtol=1e-4, atol=1e-5)
        want_kernel[run] += np.outer(x[m], cotangent[m])
        want_bias[run] += cotangent[m]
    np.testing.assert_allclose(dkernel, want_kernel, atol=1e-5)
    np.testing.assert_allclose(dbias, want_bias, atol=1e-5)
