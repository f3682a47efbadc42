"""Block: two normed halves beside the residual stream, and its statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import AttentionConfig, Block

CONFIG = AttentionConfig(model_dim=19, num_heads=6, num_kv_heads=2, head_dim=10, init_std=0.2)
B, T, D = 3, 13, 19


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    graph = request.param == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield


def test_halves_statistics_and_taps(mode):
    block = Block(CONFIG, 23, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    x = x.at[1, 4, 7].set(300.0).at[2, 12, 3].set(-9000.0)  # the second one in padding
    positions = jnp.tile(jnp.arange(T), (B, 1)).at[2, 11:].set(-1)
    (end, state, found), taps = nnx.capture(block, nnx.Intermediate)(
        x, positions=positions, statistics=True
    )
    taps = nnx.to_pure_dict(taps)
    middle = x + block.attention(block.attention_norm(x), positions=positions)[0]
    np.testing.assert_allclose(taps["residual_attention"][0], middle, rtol=1e-5, atol=1e-5)
    expected = middle + block.mlp(block.mlp_norm(middle))
    np.testing.assert_allclose(taps["residual_mlp"][0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, expected, rtol=1e-5, atol=1e-5)
    assert state is None and "key_mass" in found

    stream = np.abs(np.stack([middle, end], axis=1))
    norms = np.linalg.norm(stream, axis=-1)
    np.testing.assert_allclose(found["residual_norm"], norms, rtol=1e-5)
    assert found["residual_norm"].shape == (B, 2, T)
    for row, length in enumerate((T, T, 11)):
        real = stream[row, :, :length].reshape(2, -1)
        top = np.sort(real, axis=-1)[:, ::-1][:, :3]
        np.testing.assert_allclose(found["residual_top"][row], top, rtol=1e-5)
        np.testing.assert_allclose(found["residual_median"][row], np.median(real, -1), rtol=1e-5)


def test_plain_call_leaves_the_module_as_it_was(mode):
    block = Block(CONFIG, 23, rngs=nnx.Rngs(0))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(block))]
    _, _, found = block(jnp.ones((B, T, D)))
    assert found == {}
    assert [path for path, _ in nnx.to_flat_state(nnx.state(block))] == paths
    assert set(nnx.to_pure_dict(nnx.state(block))) == {
        "attention",
        "attention_norm",
        "mlp",
        "mlp_norm",
    }


@pytest.mark.parametrize("placement, norm", [("post", "pre_affine"), ("sandwich", "dynamic_tanh")])
def test_norm_placement(placement, norm):
    config = dataclasses.replace(CONFIG, norm_placement=placement, norm=norm)
    block = Block(config, 23, rngs=nnx.Rngs(0))
    names = {"attention_norm", "mlp_norm"}
    if placement == "sandwich":
        names |= {"attention_norm_out", "mlp_norm_out"}
    leaves = {"post": {"pre_scale", "scale"}, "sandwich": {"alpha", "scale", "bias"}}[placement]
    for seed, name in enumerate(sorted(names)):  # no two norms are alike
        module = getattr(block, name)
        assert set(nnx.to_pure_dict(nnx.state(module))) == leaves
        module.scale[...] = jax.random.uniform(jax.random.key(seed), (D,), minval=0.5, maxval=2)
    assert set(nnx.to_pure_dict(nnx.state(block))) == names | {"attention", "mlp"}
    x = jax.random.normal(jax.random.key(9), (B, T, D))

    @jax.jit
    def run(block, x):
        return nnx.capture(lambda m, x: m(x, statistics=True), nnx.Intermediate)(block, x)

    @jax.jit
    def expected(block, x):
        def attention(x):
            return block.attention(x)[0]

        if placement == "post":
            middle = block.attention_norm(x + attention(x))
            return middle, block.mlp_norm(middle + block.mlp(middle))
        middle = x + block.attention_norm_out(attention(block.attention_norm(x)))
        return middle, middle + block.mlp_norm_out(block.mlp(block.mlp_norm(middle)))

    (end, _, found), taps = run(block, x)
    taps, (middle, last) = nnx.to_pure_dict(taps), expected(block, x)
    np.testing.assert_allclose(taps["residual_attention"][0], middle, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(taps["residual_mlp"][0], last, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)
    norms = np.linalg.norm(np.stack([middle, last], axis=1), axis=-1)
    np.testing.assert_allclose(found["residual_norm"], norms, rtol=1e-5)
