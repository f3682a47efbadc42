"""Norms own float32 gains, keep the type of their input and start as their sources do."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import RMSNorm, make_norm
from sinkjax.modules.variant import LayerVariant
from sinkjax.ops import norms

D = 7
SHAPES = {
    "rms": {"scale": (D,)},
    "single_scale": {"scale": ()},
    "pre_affine": {"pre_scale": (D,), "scale": (D,)},
    "gated": {"scale": (D,), "down": (D, 16), "up": (16, D)},
    "dynamic_tanh": {"alpha": (), "scale": (D,), "bias": (D,)},
}


def test_value_and_types():
    norm = RMSNorm(5, epsilon=0.5, param_dtype="bfloat16")
    assert norm.scale[...].dtype == jnp.float32
    norm.scale[...] = jnp.arange(5.0)
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    expected = np.arange(5) * x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", SHAPES)
def test_every_norm_of_the_config(name: str):
    config = LayerVariant(norm=name, norm_epsilon=0.3, init_std=0.4, param_dtype="bfloat16")
    norm = make_norm(D, config, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(norm))
    assert jax.tree.map(jnp.shape, params) == SHAPES[name]
    for leaf, value in params.items():
        if leaf in ("down", "up"):
            assert value.dtype == jnp.bfloat16
            assert 0.3 < float(value.astype(jnp.float32).std()) < 0.5
        else:
            assert value.dtype == jnp.float32
            np.testing.assert_array_equal(value, {"alpha": 0.5, "bias": 0.0}.get(leaf, 1.0))
    # Each leaf is where it belongs and epsilon arrives: all different, against the function.
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in params.items()}
    state = nnx.state(norm)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(norm, state)
    x = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.float32)
    if name == "dynamic_tanh":
        expected = norms.dynamic_tanh(x, params["alpha"], params["scale"], params["bias"])
    else:
        function = {
            "rms": norms.rms_norm,
            "single_scale": norms.single_scale_norm,
            "pre_affine": norms.pre_affine_norm,
            "gated": norms.gated_norm,
        }[name]
        expected = function(x, **params, epsilon=0.3)
    np.testing.assert_array_equal(norm(x), expected)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_another_norm_is_refused():
    config = SimpleNamespace(norm="layer", norm_epsilon=0.3, param_dtype="float32")
    with pytest.raises(ValueError, match="norm: expected one of rms, .*; got 'layer'"):
        make_norm.__wrapped__(D, config, nnx.Rngs(0))
