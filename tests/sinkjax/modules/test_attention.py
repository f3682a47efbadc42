"""Attention against a dense NumPy computation from the same parameters, and its refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import Attention, AttentionConfig
from sinkjax.modules.variant import GATES

BASE = AttentionConfig(model_dim=19, num_heads=6, num_kv_heads=2, head_dim=10, init_std=0.3)
B, T = 3, 13

VARIANTS = {
    "plain": BASE,
    "everything": dataclasses.replace(
        BASE, sinks=True, gate="headwise", qk_norm=True, window=4, num_sink_tokens=2
    ),
    "unusual": dataclasses.replace(
        BASE,
        normalizer="sigmoid(bias=-1.5)",
        gate="elementwise",
        window=3,
        is_causal=False,
        rope_theta=None,
        scale=0.7,
        logits_soft_cap=2.0,
    ),
    "softpick": dataclasses.replace(BASE, normalizer="softpick", rope_theta=500.0),
}


def build(config):
    """A layer whose norms and sinks are not at their special initial values."""
    module = Attention(config, rngs=nnx.Rngs(5))
    rng = np.random.default_rng(6)
    state = nnx.state(module, nnx.Param)
    moved = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), state)
    nnx.update(module, moved)
    return module


def inputs():
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(B, T, 19)), jnp.float32)
    lengths = [5, T, 8]  # where the second segment starts; the last row ends in padding
    segments = np.array([[1 + (t >= n) for t in range(T)] for n in lengths])
    positions = np.array([[t - n * (t >= n) for t in range(T)] for n in lengths])
    segments[2, 11:], positions[2, 11:] = 0, -1
    return x, jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


def dense(module, x, positions, segments):
    """out [B, T, D], weights [B, N, T, S], rotated keys and values, in float64 NumPy."""
    config = module.config
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))
    x, pos, seg = (np.asarray(a) for a in (x, positions, segments))
    q, k, v = (
        np.einsum("btd,dnh->btnh", x, p[name]["kernel"]) for name in ("query", "key", "value")
    )
    if config.qk_norm:
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + config.norm_epsilon) * p[name]["scale"]
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    if config.rope_theta:
        half = config.head_dim // 2
        angle = pos[..., None, None] * config.rope_theta ** (-np.arange(half) / half)

        def turn(a):
            z = (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * angle)
            return np.concatenate([z.real, z.imag], axis=-1)

        q, k = turn(q), turn(k)
    group = config.num_heads // config.num_kv_heads
    keys, values = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", q, keys) * (config.scale or config.head_dim**-0.5)
    if config.logits_soft_cap:
        logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
    gap = pos[:, :, None] - pos[:, None, :]
    where = (seg[:, :, None] == seg[:, None, :]) & (pos[:, None, :] >= 0)
    if config.is_causal:
        where &= gap >= 0
    if config.window:
        where &= (np.abs(gap) < config.window) | (pos[:, None, :] < config.num_sink_tokens)
    where = np.broadcast_to(where[:, None], logits.shape)
    if config.normalizer.startswith("sigmoid"):
        w = where / (1 + np.exp(1.5 - logits))
    elif config.normalizer == "softpick":
        e = np.where(where, np.exp(logits) - 1, 0)
        w = np.maximum(e, 0) / (np.abs(e).sum(-1, keepdims=True) + 1e-8)
    else:
        e = np.where(where, np.exp(logits), 0)
        total = e.sum(-1, keepdims=True)
        total = total + np.exp(p["sinks"])[:, None, None] if config.sinks else total
        w = e / np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnh->btnh", w, values)
    if config.gate != "none":
        equation = "btd,dn->btn" if config.gate == "headwise" else "btd,dnh->btnh"
        gate = 1 / (1 + np.exp(-np.einsum(equation, x, p["gate"]["kernel"])))
        out = out * (gate[..., None] if config.gate == "headwise" else gate)
    return np.einsum("btnh,nhd->btd", out, p["out"]["kernel"]), w, k, v


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_dense_numpy(name):
    module, (x, positions, segments) = build(VARIANTS[name]), inputs()
    run = jax.jit(lambda m: m(x, positions=positions, segment_ids=segments, statistics=True))
    out, state, found = run(module)
    expected, weights, keys, values = dense(module, x, positions, segments)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    assert state is None
    np.testing.assert_allclose(found["key_mass"], weights.sum(2), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found["row_mass"], weights.sum(3), rtol=2e-5, atol=2e-5)
    key_norm = np.linalg.norm(keys, axis=-1).swapaxes(1, 2)
    np.testing.assert_allclose(found["key_norm"], key_norm, rtol=1e-5)
    value_norm = np.linalg.norm(values, axis=-1).swapaxes(1, 2)
    np.testing.assert_allclose(found["value_norm"], value_norm, rtol=1e-5)
    assert all(value.dtype == jnp.float32 for value in found.values())


def test_positions_default_to_the_index():
    module, (x, _, _) = build(VARIANTS["everything"]), inputs()
    index = jnp.arange(T)
    out, _, empty = module(x)
    given, _, _ = module(x, positions=index, segment_ids=jnp.ones(T, jnp.int32))
    np.testing.assert_allclose(out, given, rtol=1e-6, atol=1e-6)
    assert empty == {}


def test_statistics_do_not_change_output_or_gradient():
    module, (x, _, _) = build(VARIANTS["everything"]), inputs()

    def loss(module, statistics):
        out, _, found = module(x, statistics=statistics)
        return (out**2).sum() + sum(jnp.nansum(value) for value in found.values()) * statistics

    for leaf, other in zip(
        jax.tree.leaves(jax.grad(loss)(module, True)),
        jax.tree.leaves(jax.grad(loss)(module, False)),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


def test_taps():
    module, (x, positions, segments) = build(VARIANTS["everything"]), inputs()
    call = nnx.capture(module, nnx.Intermediate)
    (out, _, _), found = call(x, positions=positions, segment_ids=segments)
    found = nnx.to_pure_dict(found)
    _, weights, keys, values = dense(module, x, positions, segments)
    np.testing.assert_allclose(found["weights"][0], weights, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found["key_rotated"][0], keys, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found["value"][0], values, rtol=2e-5, atol=2e-5)
    assert found["query"][0].shape == found["query_rotated"][0].shape == (B, T, 6, 10)
    assert not np.allclose(found["query"][0], found["query_rotated"][0])
    assert found["gate"][0].shape == (B, T, 6)
    np.testing.assert_allclose(module.out(found["attention_out"][0]), out, rtol=1e-5, atol=1e-6)


def test_parameters_names_shapes_and_start():
    shapes = {
        "query": {"kernel": (19, 6, 10)},
        "key": {"kernel": (19, 2, 10)},
        "value": {"kernel": (19, 2, 10)},
        "out": {"kernel": (6, 10, 19)},
    }
    module = Attention(dataclasses.replace(BASE, init_std=0.02), rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module))
    assert jax.tree.map(jnp.shape, params) == shapes
    assert 0.018 < float(params["query"]["kernel"].std()) < 0.022
    config = VARIANTS["everything"]
    params = nnx.to_pure_dict(nnx.state(Attention(config, rngs=nnx.Rngs(0))))
    more = {"query_norm": {"scale": (10,)}, "key_norm": {"scale": (10,)}, "sinks": (6,)}
    assert jax.tree.map(jnp.shape, params) == shapes | more | {"gate": {"kernel": (19, 6)}}
    assert not params["sinks"].any() and (params["key_norm"]["scale"] == 1).all()
    config = dataclasses.replace(config, gate="elementwise")
    params = nnx.to_pure_dict(nnx.state(Attention(config, rngs=nnx.Rngs(0))))
    assert params["gate"]["kernel"].shape == (19, 6, 10)


def test_types():
    config = dataclasses.replace(
        VARIANTS["everything"], dtype="bfloat16", param_dtype="bfloat16", init_std=0.1
    )
    module = Attention(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module))
    assert params["query"]["kernel"].dtype == jnp.bfloat16
    assert params["sinks"].dtype == params["query_norm"]["scale"].dtype == jnp.float32
    x = inputs()[0]
    out, _, found = module(x.astype(jnp.bfloat16), statistics=True)
    assert out.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in found.values())
    wide = dataclasses.replace(config, dtype="float32")
    expected, _, _ = nnx.merge(nnx.graphdef(Attention(wide, rngs=nnx.Rngs(0))), nnx.state(module))(
        x
    )
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_kv_heads=4), "num_heads: expected a multiple of num_kv_heads=4, got 6"),
        (dict(window=0), "window: expected at least 1 or None, got 0"),
        (dict(head_dim=7), "head_dim: expected an even number"),
        (dict(model_dim=0), "model_dim: expected at least 1, got 0"),
        (dict(num_sink_tokens=-1), "num_sink_tokens: expected at least 0, got -1"),
        (dict(gate="wide"), f"gate: expected one of {', '.join(GATES)}; got 'wide'"),
        (dict(dtype="int8"), "dtype: expected one of float32"),
        (dict(normalizer="hardmax"), "expected one of softmax, softmax1.*'hardmax'"),
        (dict(sinks=True, normalizer="softmax1"), "sinks: expected normalizer='softmax'.*softmax1"),
        (dict(sinks=True, normalizer="sigmoid"), "sinks: expected normalizer='softmax'.*sigmoid"),
        (dict(rope_theta=0.0), "rope_theta: expected a positive number or None, got 0.0"),
        (dict(logits_soft_cap=-1.0), "logits_soft_cap: expected a positive number"),
    ],
)
def test_impossible_configs_are_refused(change, words):
    config = dataclasses.replace(BASE)
    with pytest.raises(ValueError, match=words):
        for name, value in change.items():
            # Not through the constructor: there the shape checks of the tests refuse a wrong
            # Literal before the config can.
            object.__setattr__(config, name, value)
        config.__post_init__()


def test_odd_heads_need_no_rope():
    dataclasses.replace(BASE, head_dim=7, rope_theta=None)
