"""Gate: each kind against NumPy, where it stands, how open it starts and what it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import AttentionConfig, Gate

B, T, N, K, H, D = 4, 5, 6, 3, 10, 48
SLICE, HIDDEN = 8, 2  # channels of the input that belong to a head, a quarter of them
CONFIG = AttentionConfig(
    model_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, is_causal=False, init_std=0.3
)
SUBJECTS = {
    "query": (B, T, N, H),
    "key": (B, T, K, H),
    "value": (B, T, K, H),
    "attention": (B, T, N, H),
    "output": (B, T, D),
}


def own_slice(x):
    return x.reshape(B, T, N, SLICE)


def hidden(x, p):
    z = np.einsum("btni,nim->btnm", own_slice(x), p["hidden"]) + p["hidden_bias"]
    return np.maximum(z, 0)


# Gate -> place, shapes of kernel and bias, scores [B, T, ...] without the bias, spread over the
# subject.
KINDS = {
    "elementwise": (
        "attention",
        [(D, N, H), (N, H)],
        lambda s, x, p: np.tensordot(x, p["kernel"], 1),
        lambda z: z,
    ),
    "headwise": (
        "attention",
        [(D, N), (N,)],
        lambda s, x, p: x @ p["kernel"],
        lambda z: z[..., None],
    ),
    "shared": (
        "attention",
        [(D, H), (H,)],
        lambda s, x, p: x @ p["kernel"],
        lambda z: z[:, :, None],
    ),
    "query": (
        "query",
        [(D, N, H), (N, H)],
        lambda s, x, p: np.tensordot(x, p["kernel"], 1),
        lambda z: z,
    ),
    "key": (
        "key",
        [(D, K, H), (K, H)],
        lambda s, x, p: np.tensordot(x, p["kernel"], 1),
        lambda z: z,
    ),
    "value": (
        "value",
        [(D, K, H), (K, H)],
        lambda s, x, p: np.tensordot(x, p["kernel"], 1),
        lambda z: z,
    ),
    "value_state": (
        "value",
        [(K, H, H), (K, H)],
        lambda s, x, p: np.stack([s[:, :, k] @ p["kernel"][k] for k in range(K)], axis=2),
        lambda z: z,
    ),
    "output": (
        "output",
        [(D, D), (D,)],
        lambda s, x, p: x @ p["kernel"],
        lambda z: z,
    ),
    "conditional_token": (
        "attention",
        [(N, SLICE), (N,)],
        lambda s, x, p: (own_slice(x) * p["kernel"]).sum(-1),
        lambda z: z[..., None],
    ),
    "conditional_token_mlp": (
        "attention",
        [(N, HIDDEN), (N,)],
        lambda s, x, p: (hidden(x, p) * p["kernel"]).sum(-1),
        lambda z: z[..., None],
    ),
    "conditional_head": (
        "attention",
        [(N, SLICE), (N,)],
        lambda s, x, p: np.repeat(
            (own_slice(x).mean(1, keepdims=True) * p["kernel"]).sum(-1), T, axis=1
        ),
        lambda z: z[..., None],
    ),
    "unconditional_head": (
        "attention",
        [None, (N,)],
        lambda s, x, p: np.zeros((B, T, N)),
        lambda z: z[..., None],
    ),
}


def build(gate: str, **fields) -> Gate:
    return Gate(dataclasses.replace(CONFIG, gate=gate, **fields), rngs=nnx.Rngs(0))


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def inputs(gate: str, dtype=None) -> tuple[jax.Array, jax.Array]:
    subject, x = drawn(0, SUBJECTS[KINDS[gate][0]], (B, T, D))
    return jnp.asarray(subject, dtype), jnp.asarray(x, dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("gate", KINDS)
def test_equals_numpy_and_has_gradients(x64: None, gate: str):
    place, (kernel, bias), scores, spread = KINDS[gate]
    module = build(gate, gate_open=0.25, dtype="float64", param_dtype="float64")
    assert module.place == place
    graph, state = nnx.split(module)
    shapes = {"bias": bias} | ({} if kernel is None else {"kernel": kernel})
    if gate == "conditional_token_mlp":
        shapes |= {"hidden": (N, SLICE, HIDDEN), "hidden_bias": (N, HIDDEN)}
    params = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, params) == shapes
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))

    @jax.jit
    def run(state, subject, x):
        def total(*arrays):
            module = nnx.merge(graph, arrays[0])
            out = module(*arrays[1:])
            return jnp.sum(out**2), (out, module.values(module.scores(*arrays[1:])))

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(state, subject, x)

    subject, x = inputs(gate)
    (_, (got, values)), slopes = run(state, subject, x)
    opened = sigmoid(scores(np.asarray(subject), np.asarray(x), params) + params["bias"])
    np.testing.assert_allclose(values, opened, rtol=1e-11)
    np.testing.assert_allclose(got, np.asarray(subject) * spread(opened), rtol=1e-11)
    reaches_x = gate not in ("value_state", "unconditional_head")
    leaves = [*jax.tree.leaves(slopes[0]), slopes[1], *([slopes[2]] if reaches_x else [])]
    assert len(leaves) == len(shapes) + 1 + reaches_x
    for leaf in leaves:
        assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0


@pytest.mark.parametrize(
    "gate", ["shared", "key", "output", "conditional_token_mlp", "unconditional_head"]
)
def test_rescaled_it_starts_as_the_layer_without(gate: str):
    for fields in (
        dict(gate_open=0.25, gate_rescale=True),
        dict(gate_open=1.6, gate_rescale=True, gate_activation="twice_sigmoid"),
        dict(gate_activation="twice_sigmoid"),
    ):
        module = build(gate, gate_init_std=0.0, **fields)
        subject, x = inputs(gate, jnp.float32)
        np.testing.assert_allclose(module(subject, x), subject, rtol=3e-7, err_msg=str(fields))
        rounded = subject.astype(jnp.bfloat16)
        got = module(rounded, x)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), rounded.astype(jnp.float32))


def test_nearly_open_it_starts_near_the_layer_without():
    module = build("headwise", gate_init_std=0.0, gate_open=0.99995)
    subject, x = inputs("headwise", jnp.float32)
    np.testing.assert_allclose(module(subject, x) / subject, 0.99995, rtol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "additive"])
def test_activation(activation: str):
    module = build("headwise", gate_activation=activation)
    subject, x = inputs("headwise", jnp.float32)
    z = (np.asarray(x) @ np.asarray(module.kernel[...]))[..., None]
    y = np.asarray(subject)
    expected = y * z * sigmoid(z) if activation == "silu" else y + sigmoid(z)
    np.testing.assert_allclose(module(subject, x), expected, rtol=2e-4, atol=2e-5)


def test_start():
    plain = build("elementwise", param_dtype="bfloat16")
    assert set(nnx.to_pure_dict(nnx.state(plain))) == {"kernel"}
    assert plain.kernel[...].dtype == jnp.bfloat16
    assert abs(float(plain.kernel[...].astype(jnp.float32).std()) - 0.3) < 0.02
    opened = build("elementwise", gate_open=0.25, gate_init_std=0.05, param_dtype="bfloat16")
    assert abs(float(opened.kernel[...].astype(jnp.float32).std()) - 0.05) < 0.004
    assert opened.bias[...].dtype == jnp.float32
    np.testing.assert_allclose(opened.bias[...], np.log(0.25 / 0.75), rtol=1e-6)
    free = build("unconditional_head")
    np.testing.assert_array_equal(free.bias[...], np.zeros(N))
    # Its first layer is drawn all the same, or neither would ever move.
    deep = build("conditional_token_mlp", gate_open=0.25, gate_init_std=0.0)
    assert jnp.abs(deep.hidden[...]).min() > 0 and not deep.kernel[...].any()
    subject, x = inputs("conditional_token_mlp", jnp.float32)
    slopes = jax.jit(jax.grad(lambda m: jnp.sum(m(subject, x))))(deep)
    assert jnp.abs(slopes.kernel[...]).min() > 0


def test_the_mean_over_the_text_leaves_padding_out():
    module = build("conditional_head")
    subject, x = inputs("conditional_head", jnp.float32)
    valid = jnp.ones((B, T), bool).at[1, 3:].set(False).at[2].set(False)
    run = jax.jit(lambda x: module.scores(subject, x, valid=valid))
    got = run(x)
    assert got.shape == (B, T, N)
    np.testing.assert_array_equal(got, run(x.at[1, 3:].set(jnp.nan).at[2].set(9.0)))
    np.testing.assert_array_equal(got[2], 0)
    rows = np.asarray(x).reshape(B, T, N, SLICE)
    kernel = np.asarray(module.kernel[...])
    for row, length in ((0, T), (1, 3)):
        expected = (rows[row, :length].mean(0) * kernel).sum(-1)
        np.testing.assert_allclose(got[row], np.tile(expected, (T, 1)), rtol=1e-5, atol=1e-6)


def test_scores_are_computed_in_the_type_of_the_config():
    module = build("headwise", dtype="bfloat16", gate_open=0.25)
    subject, x = inputs("headwise", jnp.float32)
    scores = module.scores(subject, x)
    assert scores.dtype == jnp.float32 and module.values(scores).dtype == jnp.float32
    wide = np.asarray(x) @ np.asarray(module.kernel[...]) + np.log(1 / 3)
    gap = np.abs(np.asarray(scores) - wide).max()
    assert 1e-4 < gap < 0.1
    plain = build("headwise", dtype="bfloat16")
    assert plain.scores(subject, x).dtype == jnp.bfloat16


def test_no_gate_is_refused():
    with pytest.raises(ValueError, match="gate: expected one of elementwise, .*; got 'none'"):
        Gate(CONFIG, rngs=nnx.Rngs(0))
