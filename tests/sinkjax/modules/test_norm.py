"""RMSNorm has a gain in float32 and keeps the type of its input."""

import jax.numpy as jnp
import numpy as np

from sinkjax.modules import RMSNorm


def test_value_and_types():
    norm = RMSNorm(5, epsilon=0.5, param_dtype="bfloat16")
    assert norm.scale[...].dtype == jnp.float32
    norm.scale[...] = jnp.arange(5.0)
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = np.arange(5) * x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
