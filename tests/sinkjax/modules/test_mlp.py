"""MLP is SwiGLU with three kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.modules import MLP


def test_equals_numpy():
    mlp = MLP(5, 11, init_std=0.7, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(mlp))
    shapes = {"gate": {"kernel": (5, 11)}, "up": {"kernel": (5, 11)}, "down": {"kernel": (11, 5)}}
    assert jax.tree.map(jnp.shape, params) == shapes
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    gate, up, down = (np.asarray(params[name]["kernel"]) for name in ("gate", "up", "down"))
    expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
