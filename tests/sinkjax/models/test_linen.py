"""The Linen decoder computes what the NNX decoder computes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.models import Decoder, linen, parameters, preset

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2, scan_layers=True)


def test_same_numbers():
    tokens = jnp.arange(14).reshape(2, 7)
    module = linen.decoder(CONFIG)
    variables = module.init(jax.random.key(0), tokens)
    model = Decoder(CONFIG, rngs=nnx.Rngs(1))
    given = jax.tree.map(jnp.shape, nn.unbox(variables["params"]))
    assert given == jax.tree.map(jnp.shape, parameters(model))
    output = jax.jit(module.apply)({"params": parameters(model)}, tokens)
    np.testing.assert_allclose(output.logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
