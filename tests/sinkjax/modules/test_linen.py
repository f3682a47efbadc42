"""The Linen modules compute what the NNX modules compute from the same parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.modules import Attention, AttentionConfig, Block, linen

CONFIG = AttentionConfig(
    model_dim=19, num_heads=6, num_kv_heads=2, head_dim=10, sinks=True, gate="headwise", window=4
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _, found = linen.block(CONFIG, 23, name="block")(x, statistics=True)
        out, _, _ = linen.attention(CONFIG, name="attention")(x)
        return out, found


def test_same_names_and_numbers():
    x = jax.random.normal(jax.random.key(0), (3, 13, 19))
    variables = jax.jit(Model().init)(jax.random.key(1), x)
    assert set(variables) == {"params"}
    params = nn.unbox(variables["params"])
    block, attention = Block(CONFIG, 23, rngs=nnx.Rngs(5)), Attention(CONFIG, rngs=nnx.Rngs(6))
    for module, name in ((block, "block"), (attention, "attention")):
        state = nnx.state(module)
        own = nnx.to_pure_dict(state)
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params[name])
        nnx.replace_by_pure_dict(state, params[name])
        nnx.update(module, state)
    y, _, expected_found = nnx.jit(lambda block, x: block(x, statistics=True))(block, x)
    expected, _, _ = nnx.jit(lambda attention, y: attention(y))(attention, y)
    out, found = jax.jit(Model().apply)(variables, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["key_mass"], expected_found["key_mass"], rtol=1e-5)

    gradient = jax.jit(jax.grad(lambda v: Model().apply(v, x)[0].sum()))(variables)
    assert nn.unbox(gradient["params"])["attention"]["sinks"].shape == (6,)
