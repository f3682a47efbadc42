"""Routing, its losses and the experts, against NumPy in float64 and against identities."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax.ops import moe
from sinkjax.ops.activations import clamped_swiglu, swiglu
from sinkjax.sharding import ROWS, make_mesh

B, T, D, F, E, k = 2, 7, 5, 11, 6, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(B, T, E))


route = jax.jit(moe.route, static_argnums=1)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def arrays():
    """x, router logits and kernels with biases, in float64."""
    rng = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    shapes |= {"gate_bias": (E, F), "up_bias": (E, F), "down_bias": (E, D)}
    kernels = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return rng.normal(size=(B, T, D)), rng.normal(size=(B, T, E)), kernels


@jax.jit
def output_and_gradients(x, logits, kernels):
    def run(x, logits, kernels):
        return moe.mixture(x, *moe.route(logits, k), kernels)

    out, pull = jax.vjp(run, x, logits, kernels)
    return out, pull(jnp.cos(out))


def one_expert(x, kernels, e):
    """Token x [D] through expert e."""
    gate, up = (x @ kernels[n][e] + kernels[f"{n}_bias"][e] for n in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][e] + kernels["down_bias"][e]


def loop(x, logits, kernels):
    out = np.zeros_like(x)
    for b, t in np.ndindex(B, T):
        chosen = np.argsort(-logits[b, t], kind="stable")[:k]
        for e, weight in zip(chosen, softmax(logits[b, t][chosen]), strict=True):
            out[b, t] += weight * one_expert(x[b, t], kernels, e)
    return out


def everyone(x, logits, kernels):
    """All experts for all tokens, most with weight 0: what autodiff knows how to differentiate."""
    weights, experts = moe.route(logits, k)
    share = (jax.nn.one_hot(experts, E) * weights[..., None]).sum(-2)
    gate, up = (
        jnp.einsum("BTD,EDF->BTEF", x, kernels[n]) + kernels[f"{n}_bias"] for n in ("gate", "up")
    )
    found = jnp.einsum("BTEF,EFD->BTED", swiglu(gate, up), kernels["down"]) + kernels["down_bias"]
    return (share[..., None] * found).sum(-2)


def test_equals_a_loop_over_tokens_and_experts(x64):
    x, logits, kernels = arrays()
    out, gradients = output_and_gradients(x, logits, kernels)
    np.testing.assert_allclose(out, loop(x, logits, kernels), rtol=1e-10, atol=1e-12)
    loss = jax.jit(jax.grad(lambda *a: jnp.sin(everyone(*a)).sum(), (0, 1, 2)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10),
        gradients,
        loss(x, logits, kernels),
    )


def test_nothing_is_dropped_when_all_choose_the_same(x64):
    x, _, kernels = arrays()
    logits = np.broadcast_to([9.0, -9, 8, -9, 7, -9], (B, T, E)) + 0.01 * arrays()[1]
    out, (_, _, gradient) = output_and_gradients(x, logits, kernels)
    np.testing.assert_allclose(out, loop(x, logits, kernels), rtol=1e-10, atol=1e-12)
    for name, leaf in gradient.items():
        used = [bool(np.abs(leaf[e]).max() > 0) for e in range(E)]
        assert used == [True, False, True, False, True, False], name


def test_the_order_of_the_experts_means_nothing(x64):
    x, logits, kernels = arrays()
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = {name: kernel[order] for name, kernel in kernels.items()}
    out, (dx, dlogits, dkernels) = output_and_gradients(x, logits, kernels)
    got, (dx2, dlogits2, dkernels2) = output_and_gradients(x, logits[..., order], moved)
    np.testing.assert_allclose(got, out, rtol=1e-12)
    np.testing.assert_allclose(dx2, dx, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(dlogits2, dlogits[..., order], rtol=1e-10, atol=1e-12)
    for name, leaf in dkernels.items():
        np.testing.assert_allclose(dkernels2[name], leaf[order], rtol=1e-10, atol=1e-12)


def test_equal_experts_are_one_layer(x64):
    """Then the weights, which sum to 1, do not matter: with all experts chosen, or with some."""
    x, logits, kernels = arrays()
    alike = {name: np.broadcast_to(kernel[:1], kernel.shape) for name, kernel in kernels.items()}
    want = one_expert(x, kernels, 0)
    np.testing.assert_allclose(output_and_gradients(x, logits, alike)[0], want, rtol=1e-10)
    all_of_them = jax.jit(lambda x, logits, kernels: moe.mixture(x, *moe.route(logits, E), kernels))
    np.testing.assert_allclose(all_of_them(x, logits, alike), want, rtol=1e-10)


def test_routes():
    weights, experts = route(LOGITS.astype(np.float32), k)
    p = softmax(LOGITS)
    chosen = np.argsort(-p, axis=-1)[..., :k]
    np.testing.assert_array_equal(experts, chosen)
    top = np.take_along_axis(p, chosen, -1)
    np.testing.assert_allclose(weights, top / top.sum(-1, keepdims=True), rtol=1e-5)
    # Equal logits: the first ones, half each.
    weights, experts = route(jnp.zeros((4, E), jnp.bfloat16), 2)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, np.full((4, 2), 0.5))
    np.testing.assert_array_equal(experts, np.tile([0, 1], (4, 1)))
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"k: expected 1 to 6 of 6 experts, got {wrong}"):
            route(jnp.zeros((4, E)), wrong)


def test_losses():
    balance, z_loss = jax.jit(moe.load_balancing_loss), jax.jit(moe.router_z_loss)
    logits = LOGITS.astype(np.float32)
    experts = np.argsort(-logits, axis=-1)[..., :k]
    mask = np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]], bool)
    real, chosen = LOGITS[mask], experts[mask]
    f = np.array([(chosen == e).sum() for e in range(E)]) / chosen.size
    want = E * (f * softmax(real).mean(0)).sum()
    np.testing.assert_allclose(balance(logits, experts, mask), want, rtol=1e-5)
    want = (np.log(np.exp(real).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(z_loss(logits, mask), want, rtol=1e-5)
    # Without a mask; even use, for which every k gives 1, and one favourite.
    want = (np.log(np.exp(LOGITS).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(z_loss(logits), want, rtol=1e-5)
    even = np.arange(B * E * 2).reshape(B, E, 2) % E
    assert balance(np.zeros((B, E, E), np.float32), even) == pytest.approx(1)
    favourite = np.where(np.arange(E) == 2, 99, np.zeros((B, T, 1))).astype(np.float32)
    assert balance(favourite, np.full((B, T, 1), 2)) == pytest.approx(E)


def test_clamped_swiglu():
    gate, up = (x.astype(np.float32) for x in RNG.normal(size=(2, 13, F)) * 9)
    g, u = np.minimum(gate, 7), np.clip(up, -7, 7)
    want = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    assert (gate > 7).any() and (np.abs(up) > 7).any() and (gate < -7).any()
    np.testing.assert_allclose(jax.jit(clamped_swiglu)(gate, up), want, rtol=1e-5, atol=1e-6)


@pytest.mark.tpu_aot
def test_on_chips_no_expert_sees_the_tokens_of_others(monkeypatch):
    """Ragged kernels forward and backward, not a dense product for each expert; nothing scatters."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(2, expert=2, devices=devices)
    B, T, D, F, E = 4, 512, 256, 384, 16

    def shape(sizes, *spec, dtype=jnp.bfloat16):
        layout = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout)

    def loss(x, logits, kernels):
        return moe.mixture(x, *moe.route(logits, 2), kernels).astype(jnp.float32).sum()

    x, logits = (shape((B, T, n), ROWS) for n in (D, E))
    kernels = {name: shape((E, D, F), "expert", "data") for name in ("gate", "up")}
    kernels["down"] = shape((E, F, D), "expert", None, "data")
    layouts = jax.tree.map(lambda leaf: leaf.sharding, (x, logits, kernels))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=layouts)
        compiled = gradient.lower(x, logits, kernels).compile()
    text = compiled.as_text()
    pairs = B * T * 2 // 2  # of one group, of which a device computes its own
    # 3 products, and 3 for the gradient by their operands; that by the kernels is a loop of tiles.
    # E / 2 dense products for it would be 24 more.
    assert 6 < compiled.cost_analysis()["flops"] / (2 * pairs * D * F) < 9
    assert not re.search(r" scatter\(", text)
    gathered = set(re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", text))
    assert {"8,256,384"} <= gathered and not {s for s in gathered if s.startswith("16,")}
