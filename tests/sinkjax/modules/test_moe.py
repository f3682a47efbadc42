"""The module hands its parameters to the functions, and routes in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import MLPVariant, MoE

B, T, D, F, E, k = 2, 7, 5, 11, 6, 3
VARIANT = MLPVariant(
    num_experts=E, num_experts_per_token=k, mlp_activation="clamped_swiglu", mlp_bias=True
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def build(variant=VARIANT, **types):
    shapes = nnx.eval_shape(lambda: MoE(D, F, variant, rngs=nnx.Rngs(0), **types))
    graphdef, state = nnx.split(shapes)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(0.7 * rng.normal(size=leaf.shape), leaf.dtype),
        nnx.to_pure_dict(state),
    )
    nnx.replace_by_pure_dict(state, drawn)
    return nnx.merge(graphdef, state)


def test_equals_the_functions():
    layer = build()
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, params) == {
        "router": {"kernel": (D, E), "bias": (E,)},
        "experts": {
            "gate": {"kernel": (E, D, F), "bias": (E, F)},
            "up": {"kernel": (E, D, F), "bias": (E, F)},
            "down": {"kernel": (E, F, D), "bias": (E, D)},
        },
    }
    mask = jnp.asarray(np.arange(T) < [[4], [7]])

    @jax.jit
    def run(layer):
        call = nnx.capture(layer, nnx.Intermediate)
        names = ("load_balancing", "router_z_loss")
        return call(X, mask=mask, statistics=True, penalties=names)

    (out, found), taps = run(layer)

    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, logits = np.asarray(X, np.float64), taps["router_logits"][0]
    want = x @ params["router"]["kernel"] + params["router"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    chosen = np.argsort(-want, axis=-1)[..., :k]
    want_out = np.zeros((B, T, D))
    for b, t in np.ndindex(B, T):
        weights = np.exp(want[b, t][chosen[b, t]])
        for e, weight in zip(chosen[b, t], weights / weights.sum(), strict=True):
            gate, up = (
                x[b, t] @ params["experts"][n]["kernel"][e] + params["experts"][n]["bias"][e]
                for n in ("gate", "up")
            )
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            down = params["experts"]["down"]
            inside = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            want_out[b, t] += weight * (inside @ down["kernel"][e] + down["bias"][e])
    np.testing.assert_allclose(out, want_out, rtol=1e-4, atol=1e-4)
    share = [[(chosen[b, :n] == e).sum() / (n * k) for e in range(E)] for b, n in enumerate((4, 7))]
    np.testing.assert_allclose(found["expert_share"], share, rtol=1e-6)
    assert set(found) == {"expert_share", "load_balancing", "router_z_loss"}
    got = found["load_balancing"], found["router_z_loss"]
    np.testing.assert_allclose(
        got, _losses(want[np.asarray(mask)], chosen[np.asarray(mask)]), rtol=1e-5
    )


def _losses(z, chosen):
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    f = [(chosen == e).mean() for e in range(E)]
    return E * (f * p.mean(0)).sum(), (np.log(np.exp(z).sum(-1)) ** 2).mean()


def test_routes_in_float32_whatever_the_type_of_the_computation():
    layer = build(MLPVariant(num_experts=E), dtype="bfloat16", param_dtype="bfloat16")
    x = X.astype(jnp.bfloat16)
    logits = np.asarray(x, np.float64) @ np.asarray(layer.router.kernel[...], np.float64)
    # In bfloat16 these differ by up to 1e-2.
    got = jax.jit(lambda layer: layer._logits(x))(layer)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5)
    out, found = jax.eval_shape(lambda layer: layer(x), layer)
    assert out.dtype == jnp.bfloat16 and found == {}
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert set(params["router"]) == {"kernel"} == set(params["experts"]["down"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_experts=-1), "num_experts: expected at least 0, got -1"),
        (dict(num_experts=1), "num_experts_per_token: expected 1 to num_experts=1, got 2"),
        (dict(num_experts_per_token=0), "num_experts_per_token: expected 1 or more, got 0"),
        (dict(mlp_activation="gelu"), "mlp_activation: expected one of swiglu, .*; got 'gelu'"),
        (dict(mlp_bias=True), "mlp_bias: expected False without experts, got True"),
    ],
)
def test_impossible_variants_are_refused(change, words):
    variant = MLPVariant()
    for name, value in change.items():
        object.__setattr__(variant, name, value)
    with pytest.raises(ValueError, match=words):
        variant.check()
