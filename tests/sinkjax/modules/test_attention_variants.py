"""Every variant of the attention module against one dense NumPy float64 computation."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import Attention, AttentionConfig
from sinkjax.strict_json import from_json, to_json
from sinkjax_kernels import normalizers

B, T, D, N, K, H = 2, 11, 24, 4, 2, 6
BASE = AttentionConfig(model_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, init_std=0.4)

# Each mechanism once, in combinations that cover most pairs of them.
VARIANTS = {
    "three sink logits": dict(sinks=True, num_sinks=3, window=4, num_sink_tokens=2),
    "sink logits per token, cap": dict(sinks=True, token_sinks=True, logits_soft_cap=1.5),
    "sink logits per token alone": dict(token_sinks=True, forget_gate=True),
    "key bias beside sinks": dict(sinks=True, kv_bias="key", window=3, logits_soft_cap=2.0),
    "two key and value biases": dict(kv_bias="key_value", num_kv_biases=2, qk_norm=True),
    "bias before RoPE": dict(kv_bias="key_value", kv_bias_position="none", gate="headwise"),
    "value bias": dict(kv_bias="value", normalizer="softpick", gate="value"),
    "context bias": dict(kv_bias="context", sinks=True, alibi="standard"),
    "learned sigmoid": dict(
        normalizer="sigmoid(bias=-1.0)", learn_normalizer=True, alibi="balanced", rope_theta=None
    ),
    "learned elastic": dict(
        normalizer="elastic_softmax", learn_normalizer=True, distance_bias=5, gate="key"
    ),
    "learned ssmax": dict(normalizer="ssmax(scale=0.7)", learn_normalizer=True, gate="query"),
    "elu": dict(normalizer="elu(normalized=True)", gate="value_state", is_causal=False),
    "stick-breaking": dict(normalizer="stick_breaking", gate="shared", rope_theta=None),
    "sparsemax": dict(normalizer="sparsemax", gate="output", share_value=True),
    "forgetting softmax1": dict(normalizer="softmax1", forget_gate=True, gate="elementwise"),
    "differential": dict(differential=True, qk_norm=True, sinks=True, gate="elementwise"),
    "isolated sinks": dict(isolate_sinks=True, num_sink_tokens=2, window=3, is_causal=False),
    "own slice": dict(gate="conditional_token", gate_open=0.3, gate_rescale=True),
    "own slice, MLP": dict(gate="conditional_token_mlp", distance_bias=4, is_causal=False),
    "one number": dict(gate="unconditional_head", alibi="standard", normalizer="softmax1"),
    "mean over the text": dict(gate="conditional_head", is_causal=False),
    "twice sigmoid": dict(gate="headwise", gate_activation="twice_sigmoid", gate_open=1.2),
    "silu": dict(gate="elementwise", gate_activation="silu"),
    "additive": dict(gate="headwise", gate_activation="additive"),
}


def build(config):
    """A layer with no leaf at a special initial value."""
    module = Attention(config, rngs=nnx.Rngs(5))
    rng = np.random.default_rng(6)
    state = nnx.state(module, nnx.Param)
    moved = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(a.dtype), state)
    nnx.update(module, moved)
    return module


def inputs():
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    positions = np.array([[t - 5 * (t >= 5) for t in range(T)], range(T)])
    segments = np.array([[1 + (t >= 5) for t in range(T)], [1] * T])
    segments[1, 9:], positions[1, 9:] = 0, -1  # padding
    return x, jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gated(config, y, z):
    if config.gate_activation == "silu":
        return y * z * sigmoid(z)
    if config.gate_activation == "additive":
        return y + sigmoid(z)
    y = y * sigmoid(z) * (2 if config.gate_activation == "twice_sigmoid" else 1)
    return y / config.gate_open if config.gate_rescale else y


def gate_scores(config, p, x, subject, real):
    """The gate's scores, broadcastable to the subject it multiplies."""
    gate, kernel = p["gate"], p["gate"].get("kernel")
    bias = gate.get("bias", 0.0)
    own = x.reshape(B, T, N, D // N)
    match config.gate:
        case "elementwise" | "query" | "key" | "value":
            return np.einsum("btd,dnh->btnh", x, kernel) + bias
        case "headwise":
            return (np.einsum("btd,dn->btn", x, kernel) + bias)[..., None]
        case "shared":
            return (x @ kernel + bias)[:, :, None]
        case "value_state":
            return np.einsum("btkh,khj->btkj", subject, kernel) + bias
        case "output":
            return x @ kernel + bias
        case "conditional_token":
            return (np.einsum("btnc,nc->btn", own, kernel) + bias)[..., None]
        case "conditional_token_mlp":
            hidden = np.einsum("btnc,ncm->btnm", own, gate["hidden"]) + gate["hidden_bias"]
            hidden = np.maximum(hidden, 0)
            return (np.einsum("btnm,nm->btn", hidden, kernel) + bias)[..., None]
        case "conditional_head":
            mean = (own * real[..., None, None]).sum(1) / real.sum(1)[:, None, None]
            return (np.einsum("bnc,nc->bn", mean, kernel) + bias)[:, None, :, None]
        case "unconditional_head":
            return np.broadcast_to(bias, (B, T, N))[..., None]


def alibi_slopes(kind):
    slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N)
    if kind == "balanced":
        half = 2.0 ** (-8 * np.arange(1, N // 2 + 1) / (N // 2))
        slopes = np.concatenate([half, -half])
    return slopes


def dense(module, x, positions, segments):
    """[B, T, D] in float64 from the module's parameters; shares only the normaliser's own spec."""
    c = module.config
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(module)))
    x, pos, seg = (np.asarray(a) for a in (x, positions, segments))
    x = x.astype(np.float64)
    real = (pos >= 0) & (seg != 0)
    projection = lambda name: np.einsum("btd,dnh->btnh", x, p[name]["kernel"])  # noqa: E731
    q, k = projection("query"), projection("key")
    v = k if c.share_value else projection("value")
    if c.qk_norm:
        q, k = (
            a / np.sqrt((a**2).mean(-1, keepdims=True) + c.norm_epsilon) * p[name]["scale"]
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    gate = lambda y: gated(c, y, gate_scores(c, p, x, y, real))  # noqa: E731
    q = gate(q) if c.gate == "query" else q
    k = gate(k) if c.gate == "key" else k
    v = gate(v) if c.gate in ("value", "value_state") else v

    def turn(a):
        if c.rope_theta is None:
            return a
        angle = pos[..., None, None] * c.rope_theta ** (-np.arange(H // 2) / (H // 2))
        z = (a[..., : H // 2] + 1j * a[..., H // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    cap = lambda s: c.logits_soft_cap * np.tanh(s / c.logits_soft_cap) if c.logits_soft_cap else s  # noqa: E731
    qr, kr = turn(q), np.repeat(turn(k), N // K, axis=2)
    scale = c.scale or H**-0.5
    described = normalizers.resolve(c.normalizer)
    if isinstance(described, normalizers.Elu):
        phi = lambda a: np.where(a > 0, a + 1, np.exp(np.minimum(a, 0)))  # noqa: E731
        logits = cap(np.einsum("btnh,bsnh->bnts", phi(qr), phi(kr)) * scale)
    else:
        logits = cap(np.einsum("btnh,bsnh->bnts", qr, kr) * scale)
    gap = pos[:, :, None] - pos[:, None, :]
    if c.alibi != "none":
        logits = logits - alibi_slopes(c.alibi)[:, None, None] * np.abs(gap)[:, None]
    if c.distance_bias:
        near = np.abs(gap) < c.distance_bias
        table = p["distance_bias"][:, np.minimum(np.abs(gap), c.distance_bias - 1)].swapaxes(0, 1)
        logits = logits + np.where(near[:, None], table, 0)
    if c.forget_gate:
        log_f = np.log(sigmoid(x @ p["forget"]["kernel"] + p["forget"]["bias"]))
        total = np.cumsum(np.where(real[..., None], log_f, 0), axis=1).swapaxes(1, 2)
        logits = logits + total[..., :, None] - total[..., None, :]
    where = (seg[:, :, None] == seg[:, None, :]) & (pos[:, None, :] >= 0)
    if c.is_causal:
        where &= gap >= 0
    if c.window:
        where &= (np.abs(gap) < c.window) | (pos[:, None, :] < c.num_sink_tokens)
    if described.excludes_self:
        where &= gap != 0
    if c.isolate_sinks:
        where &= (pos[:, :, None] >= c.num_sink_tokens) | (gap == 0)
    where = np.broadcast_to(where[:, None], logits.shape)

    extra = []  # more terms of the denominator, [B, N, T] each
    if c.sinks:
        extra += [np.broadcast_to(s[None, :, None], (B, N, T)) for s in p["sinks"].reshape(N, -1).T]
    if c.token_sinks:
        extra.append((x @ p["token_sinks"]["kernel"]).swapaxes(1, 2))
    slots = []
    if c.kv_bias in ("key", "key_value", "context"):
        at = qr if c.kv_bias_position == "start" else q
        keys = np.repeat(p["kv_bias"]["key"], N // K, axis=0)
        found = cap(np.einsum("btnh,nmh->bntm", at, keys) * scale)
        slots = [found[..., m] for m in range(c.num_kv_biases)]
    values = p.get("kv_bias", {}).get("value")
    values = None if values is None else np.repeat(values, N // K, axis=0)
    inside = [] if c.kv_bias == "context" else slots
    if isinstance(described, normalizers.Softmax):
        e = np.where(where, np.exp(logits), 0)
        total = e.sum(-1) + sum(np.exp(s) for s in extra + inside)
        w = e / np.where(total == 0, 1, total)[..., None]
    else:
        params = {n: jnp.asarray(a)[:, None, None] for n, a in p.get("normalizer", {}).items()}
        order = jnp.asarray(pos)[:, None, None, :]
        with jax.enable_x64(True):
            arguments = jax.tree.map(jnp.asarray, (logits, where, params))
            w = normalizers.weights(
                described, arguments[0], arguments[1], params=arguments[2], key_order=order
            )[0]
        w = np.asarray(w, np.float64)
    values_real = np.repeat(v, N // K, axis=2)
    if c.differential:
        half = K // 2
        wide = np.concatenate([v[:, :, :half], v[:, :, half:]], axis=-1)
        wide = np.repeat(np.concatenate([wide, wide], axis=2), N // K, axis=2)
        maps = np.einsum("bnts,bsnh->btnh", w, wide)
        d = p["differential"]
        lam = math.exp(d["query_1"] @ d["key_1"]) - math.exp(d["query_2"] @ d["key_2"]) + 0.8
        pair = maps[:, :, : N // 2] - lam * maps[:, :, N // 2 :]
        pair = pair / np.sqrt((pair**2).mean(-1, keepdims=True) + c.norm_epsilon) * d["scale"]
        pair = pair * 0.2
        out = np.concatenate([pair[..., :H], pair[..., H:]], axis=2)
    else:
        out = np.einsum("bnts,bsnh->btnh", w, values_real)
    if c.kv_bias == "value":
        out = out + values.sum(1)
    elif values is not None:
        for m, slot in enumerate(slots):
            below = total + (sum(np.exp(s) for s in slots) if c.kv_bias == "context" else 0)
            share = np.exp(slot) / below
            out = out + share.swapaxes(1, 2)[..., None] * values[:, m]
    places = ("none", "query", "key", "value", "value_state", "output")
    out = out if c.gate in places else gate(out)
    out = np.einsum("btnh,nhd->btd", out, p["out"]["kernel"])
    return gate(out) if c.gate == "output" else out


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_dense_numpy(name):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    module, (x, positions, segments) = build(config), inputs()
    run = jax.jit(lambda m: m(x, positions=positions, segment_ids=segments, statistics=True))
    out, state, found = run(module)
    expected = dense(module, x, positions, segments)
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(
        np.asarray(out)[real], expected[real], rtol=3e-4, atol=3e-4 * np.abs(expected).max()
    )
    assert state is None and all(np.isfinite(v[np.isfinite(v)]).all() for v in found.values())


def test_every_variant_round_trips_through_json():
    for fields in VARIANTS.values():
        config = dataclasses.replace(BASE, **fields)
        assert from_json(AttentionConfig, to_json(config)) == config
        assert set(json.loads(to_json(config))) == {f.name for f in dataclasses.fields(config)}
