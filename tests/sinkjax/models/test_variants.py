"""Every named variant in one model: cached or not, scanned or not, causal or not, NNX or Linen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full
from sinkjax.models import Decoder, DecoderConfig, config_from_json, config_to_json
from sinkjax.models.parameters import abstract, parameters, unroll
from sinkjax.models.variants import variants
from sinkjax.modules import Attention, AttentionConfig, Block, linen
from sinkjax.modules.variant import LayerVariant

BASE = DecoderConfig(
    vocab_size=13,
    model_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=11,
    context_length=8,
    init_std=0.3,
)
TABLE = variants(8)
B, T = 2, 8
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (B, T)))
# A scan is a program of its own for every variant: one of each kind of leaf and of kernel.
SCANNED = ("elastic softmax", "forgetting", "4 key and value biases", "gated norm")


def config_of(name, **more):
    return dataclasses.replace(BASE, **TABLE[name].fields, **more)


def moved(model):
    """The model with every parameter away from its special initial value."""
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    nnx.update(
        model, jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(a.dtype), state)
    )
    return model


@pytest.mark.parametrize("name", TABLE)
def test_with_and_without_a_cache(name):
    """Two chunks through a cache give the logits of the whole text."""
    config = config_of(name)
    assert config_from_json(config_to_json(config)) == config
    model = moved(Decoder(config, rngs=nnx.Rngs(0)))
    expected = model(TOKENS).logits
    assert np.isfinite(expected).all()
    cache, found = model.init_cache(Full(T), B), []
    for part in jnp.split(TOKENS, 2, axis=1):
        output = model(part, cache=cache)
        found.append(output.logits)
        cache = output.cache
    np.testing.assert_allclose(
        jnp.concatenate(found, axis=1), expected, atol=2e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", SCANNED)
def test_scanned_and_unrolled(name):
    """Logits and the gradients of every parameter."""
    scanned = moved(Decoder(config_of(name, scan_layers=True), rngs=nnx.Rngs(0)))

    def loss(model):
        logits = model(TOKENS).logits
        return (jax.nn.log_softmax(logits)[..., 3] ** 2).mean(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(scanned)
    unrolled = unroll(scanned)
    expected_gradients, expected = jax.grad(loss, has_aux=True)(unrolled)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    stacked = parameters(gradients)["blocks"][0]
    layers = [parameters(expected_gradients)["blocks"][i] for i in range(2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(stacked), jax.tree.leaves(both), strict=True
    ):
        scale = max(float(jnp.abs(want).max()), 1e-6)
        np.testing.assert_allclose(got, want, atol=1e-3 * scale, err_msg=str(path))
        # A leaf without a gradient is a variant that is not wired up; a bias of all keys
        # alike leaves a softmax as it is.
        assert np.abs(want).max() > 0, path


@pytest.mark.parametrize("name", TABLE)
def test_shapes_scanned_and_through_linen(name):
    """Traced only: the scan, and the Linen bridge with the parameters of the NNX module."""
    config = config_of(name, scan_layers=True)
    shape = jax.eval_shape(lambda model: model(TOKENS).logits, abstract(config))
    assert shape.shape == (B, T, 13)
    layer = config.layer(0)
    x = jax.ShapeDtypeStruct((B, T, 16), jnp.float32)
    variables = jax.eval_shape(linen.block(layer, 11).init, jax.random.key(0), x)
    own = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Block(layer, 11, rngs=nnx.Rngs(0)))))
    given = nn.unbox(variables["params"])
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, own)


@pytest.mark.parametrize("name", TABLE)
def test_not_causal(name):
    """Either it looks both ways, or the config says why it cannot."""
    variant = {field.name for field in dataclasses.fields(LayerVariant)}
    fields = {k: v for k, v in TABLE[name].fields.items() if k in variant}
    sizes = dict(model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.3)
    if name in ("stick-breaking", "forgetting"):
        with pytest.raises(ValueError, match="causal"):
            AttentionConfig(**sizes, **fields, is_causal=False)
        return
    module = moved(Attention(AttentionConfig(**sizes, **fields, is_causal=False), nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    first = module(x)[0][:, 0]
    other = jax.random.normal(jax.random.key(1), x.shape)
    changed = module(other.at[:, 0].set(x[:, 0]))[0][:, 0]
    assert np.isfinite(first).all() and not np.allclose(first, changed, atol=1e-5)
