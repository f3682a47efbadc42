"""Projection is its einsum, in the types it was given."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.modules import Projection


def test_value_types_and_start():
    layer = Projection(
        "BTNH,NHD->BTD",
        (3, 5, 700),
        init_std=0.5,
        dtype="bfloat16",
        param_dtype="float32",
        rngs=nnx.Rngs(0),
    )
    kernel = np.asarray(layer.kernel[...])
    assert kernel.dtype == np.float32
    assert abs(kernel.std() - 0.5) < 0.02
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 5)).astype(np.float32)
    y = layer(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    expected = np.tensordot(x, kernel, axes=((2, 3), (0, 1)))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.08)
