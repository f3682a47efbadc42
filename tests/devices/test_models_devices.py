"""The decoder and its projections on meshes of 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters
from sinkjax.modules.projection import contract
from sinkjax.sharding import batch_sharding, make_mesh, shardings

CONFIG = DecoderConfig(
    vocab_size=36,
    model_dim=24,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=44,
    context_length=64,
    windows=(5, None),
    sinks=True,
    gate="headwise",
    scan_layers=True,
)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(
    ("equation", "kernel", "name"),
    [
        ("BTD,DNH->BTNH", (24, 6, 10), "blocks/0/attention/query/kernel"),
        ("BTNH,NHD->BTD", (6, 10, 24), "blocks/0/attention/out/kernel"),
        ("BTF,FD->BTD", (44, 24), "blocks/0/mlp/down/kernel"),
        ("BTD,DV->BTV", (24, 36), "head/kernel"),
    ],
)
def test_contract_on_a_mesh(explicit, equation, kernel, name):
    mesh = make_mesh(4, 2, explicit=explicit)
    rng = np.random.default_rng(0)
    w = rng.normal(size=kernel).astype(np.float32)
    sizes = dict(zip(equation.split("->")[0].split(",")[1], kernel, strict=True))
    sizes |= {"B": 8, "T": 5}
    letters = equation.split(",")[0]
    x = rng.normal(size=[sizes[n] for n in letters]).astype(np.float32)
    spec = ["data"] + ["model" if n in "NF" else None for n in letters[1:]]

    def loss(x, w):
        return (contract(equation, x, w) ** 2).sum()

    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))),
            jax.device_put(w, shardings({name: w}, mesh)[name]),
        )
        got = jax.jit(jax.grad(loss, (0, 1)))(*placed)
        y = jax.jit(lambda x, w: contract(equation, x, w))(*placed)
    np.testing.assert_allclose(y, np.einsum(equation, x, w), rtol=1e-4, atol=1e-4)
    assert y.sharding.spec[0] == "data"
    for leaf, want in zip(got, jax.grad(loss, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("explicit", [False, True])
def test_decoder_on_a_mesh(explicit):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 36, (8, 13)))
    want = model(tokens).logits
    mesh = make_mesh(4, 2, explicit=explicit)
    params = parameters(model)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        tokens = jax.device_put(tokens, batch_sharding(mesh))
        got = jax.jit(lambda p, t: from_parameters(CONFIG, p)(t).logits)(params, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert got.sharding.spec[0] == "data"
