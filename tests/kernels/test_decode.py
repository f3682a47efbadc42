"""Decode attention against a double loop in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import decode, masks, normalizers
from sinkjax_kernels.decode import int8
from sinkjax_kernels.flash import reference as flash

attend: Any = decode.decode_attention
B, T, S, N, K, H, V = 2, 3, 11, 6, 2, 8, 5
POSITIONS = np.array(
    [[0, 1, 17, 12, -1, 14, 15, 16, 9, 10, 11], [0, -1, 3, 2, 5, 4, -1, -1, -1, -1, -1]]
)
QUERIES = np.array([[15, 16, 17], [4, -1, 5]])


def arrays(dtype=np.float32):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"query": (B, T, N, H), "key": (B, K, S, H), "value": (B, K, S, V)}
    return {name: (1.5 * draw(shape)).astype(dtype) for name, shape in shapes.items()}


def by_hand(x, *, key_positions, sink_query, slots, num_sink_tokens, window, scale, cap, extra):
    """Softmax with `extra[b, t, n]` added to the denominator; one score at a time."""
    out, lse = np.zeros((B, T, N, V)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        k, logits, values = n // (N // K), [], []
        for s in range(S):
            at, query = key_positions[b, k, s], QUERIES[b, t]
            if not 0 <= at <= query:
                continue
            if at >= num_sink_tokens and s >= slots and query - at >= window:
                continue
            q = sink_query if s < slots else x["query"]
            score = scale * float(q[b, t, n] @ x["key"][b, k, s])
            logits.append(score if cap is None else cap * np.tanh(score / cap))
            values.append(x["value"][b, k, s])
        total = np.exp(logits).sum() + extra[b, t, n]
        if total > 0:
            lse[b, t, n] = np.log(total)
            for logit, value in zip(logits, values, strict=True):
                out[b, t, n] += np.exp(logit) / total * value
    return out, lse


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("slots", "sinks", "cap", "own"),
    [
        (0, None, None, True),
        (2, "head", None, True),
        (S, "token", 1.3, True),
        (3, None, None, False),
    ],
)
def test_reference_is_the_loop(slots, sinks, cap, own, per_head):
    x = arrays()
    draw = np.random.default_rng(1)
    sink_query = draw.standard_normal((B, T, N, H)).astype(np.float32)
    logits = {"head": np.linspace(-2, 4, N), "token": draw.standard_normal((B, T, N))}.get(sinks)
    keys = np.broadcast_to(POSITIONS[:, None], (B, K, S)).copy()
    if per_head:
        keys[:, 1] = np.roll(keys[:, 1], 3, axis=-1)
    extra = np.zeros((B, T, N)) if logits is None else np.broadcast_to(np.exp(logits), (B, T, N))
    want, want_lse = by_hand(
        x,
        key_positions=keys,
        sink_query=sink_query if own else x["query"],
        slots=slots,
        num_sink_tokens=2,
        window=5,
        scale=0.4,
        cap=cap,
        extra=extra,
    )
    out, lse = attend(
        **{name: jnp.asarray(leaf) for name, leaf in x.items()},
        query_positions=jnp.asarray(QUERIES),
        key_positions=jnp.asarray(keys if per_head else keys[:, :1]),
        sink_query=jnp.asarray(sink_query) if own else None,
        num_sink_slots=slots,
        num_sink_tokens=2,
        window=5,
        sinks=None if logits is None else jnp.asarray(logits, jnp.float32),
        normalizer=normalizers.Softmax(),
        scale=0.4,
        logits_soft_cap=cap,
    )
    np.testing.assert_allclose(out, want, rtol=0, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)
    assert (np.asarray(out)[1, 1] == 0).all()  # padding


@pytest.mark.parametrize(("tokens", "group"), [(1, 2), (1, 3), (2, 2), (3, 1)])
def test_few_queries_of_a_key_head_are_those_among_more(tokens, group):
    """CPU scores up to four of them one by one; the loop above has nine."""
    x = arrays()
    sink_query = np.random.default_rng(1).standard_normal((B, T, N, H)).astype(np.float32)
    heads = np.arange(N).reshape(K, N // K)[:, :group].ravel()

    def run(tokens, heads):
        out, lse = attend(
            jnp.asarray(x["query"][:, :tokens, heads]),
            jnp.asarray(x["key"]),
            jnp.asarray(x["value"]),
            query_positions=jnp.asarray(QUERIES[:, :tokens]),
            key_positions=jnp.asarray(POSITIONS[:, None]),
            sink_query=jnp.asarray(sink_query[:, :tokens, heads]),
            num_sink_slots=2,
            window=5,
            normalizer=normalizers.Softmax(),
            scale=0.4,
        )
        return np.asarray(out), np.asarray(lse)

    for few, all_of_them in zip(run(tokens, heads), run(T, np.arange(N)), strict=True):
        np.testing.assert_allclose(few, all_of_them[:, :tokens, heads], rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["softmax1", "softmax_n(n=2.0)", "sigmoid(bias=-1.0)", "softpick"])
def test_weights_are_the_specification(name):
    x = arrays()
    description = normalizers.resolve(name)
    out, lse = attend(
        **{name: jnp.asarray(leaf) for name, leaf in x.items()},
        query_positions=jnp.asarray(QUERIES),
        key_positions=jnp.asarray(POSITIONS[:, None]),
        window=5,
        normalizer=description,
        scale=0.4,
    )
    key, value = (np.repeat(x[name], N // K, axis=1) for name in ("key", "value"))
    logits = 0.4 * np.einsum("btnh,bnsh->bnts", x["query"], key)
    distance = QUERIES[:, :, None] - POSITIONS[:, None]
    where = jnp.asarray(POSITIONS[:, None] >= 0) & (distance >= 0) & (distance < 5)
    weights, want_lse = normalizers.weights(description, jnp.asarray(logits), where[:, None])
    np.testing.assert_allclose(out, np.einsum("bnts,bnsv->btnv", weights, value), rtol=0, atol=3e-6)
    assert (lse is None) == (want_lse is None)
    if want_lse is not None:
        np.testing.assert_allclose(lse, want_lse.swapaxes(1, 2), rtol=0, atol=3e-6)


EVERY = [
    "softmax", "softmax1", "softmax_n(n=2.0)", "sigsoftmax", "cog", "sigmoid(bias=-1.0)",
    "sigmoid(normalized=True)", "relu(divisor=2.0)", "relu(by_length=True)", "relu(normalized=True)",
    "elu", "elu(normalized=True)", "identity", "identity(normalized=True)", "consmax", "softpick",
    "rectified_only", "relu_softmax", "scaled_softpick", "ssmax", "clipped_softmax(alpha=0.5)",
    "normalized_clipped_softmax", "elastic_softmax(offset=-0.5)", "sparsemax", "entmax15",
    "entmax(alpha=1.25)", "stick_breaking",
]  # fmt: skip


def test_every_normalizer_decodes_as_it_trains():
    """Decode equals `flash.reference` on the same keys: order, learned leaves, bias, own position."""
    described = {name: normalizers.resolve(name) for name in EVERY}
    assert {type(n) for n in described.values()} == set(normalizers.NAMES)
    x = {name: jnp.asarray(leaf) for name, leaf in arrays().items()}
    keys = np.broadcast_to(POSITIONS[:, None], (B, K, S)).copy()
    keys[:, 1] = np.roll(keys[:, 1], 3, axis=-1)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(B, N, T, S)), jnp.float32)
    visibility = masks.build(
        (B, T, S, K), is_causal=True, local_window_size=(6, 0), num_sink_tokens=2,
        query_positions=jnp.asarray(QUERIES), key_positions=jnp.asarray(keys),
    )  # fmt: skip

    @jax.jit
    def run(x, bias):
        results = {}
        for name, description in described.items():
            params = {n: jnp.linspace(-0.2, 0.3, N) for n in description.parameters}
            static: dict[str, Any] = {
                "normalizer": description,
                "normalizer_params": params,
                "scale": 0.4,
                "logits_soft_cap": 2.0,
            }
            got = attend(
                **x, query_positions=jnp.asarray(QUERIES), key_positions=jnp.asarray(keys),
                window=7, num_sink_tokens=2, bias=bias, **static,
            )  # fmt: skip
            key, value = (x[name].swapaxes(1, 2) for name in ("key", "value"))
            want = flash.attention(x["query"], key, value, bias, None, visibility, None, **static)
            results[name] = got, want
        return results

    for name, ((out, lse), (want, want_lse)) in run(x, bias).items():
        assert np.abs(want).max() > 0.01, name
        np.testing.assert_allclose(
            out, want, rtol=0, atol=1e-5 * (1 + np.abs(want).max()), err_msg=name
        )
        assert (np.asarray(out)[1, 1] == 0).all(), name  # padding
        assert (lse is None) == (want_lse is None) != described[name].has_log_sum_exp
        if lse is not None:
            np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)


def test_bias_is_added_after_the_cap():
    """A bias of −∞ hides a slot; one per head, or for all heads, is broadcast."""
    x = {name: jnp.asarray(leaf) for name, leaf in arrays().items()}
    options: dict[str, Any] = {
        "query_positions": jnp.asarray(QUERIES),
        "normalizer": normalizers.Softmax(),
        "scale": 0.4,
        "logits_soft_cap": 1.5,
    }
    hidden = POSITIONS.copy()
    hidden[:, 4:] = -1
    want, _ = attend(**x, key_positions=jnp.asarray(hidden[:, None]), **options)
    low = jnp.where(jnp.arange(S) < 4, 0.0, -1e9)
    for shape in [(1, 1, 1, S), (1, N, 1, S), (B, N, T, S)]:
        keys = jnp.asarray(POSITIONS[:, None])
        got, _ = attend(**x, key_positions=keys, bias=jnp.broadcast_to(low, shape), **options)
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)


def test_learned_bias_per_head():
    x = {name: jnp.asarray(leaf) for name, leaf in arrays().items()}
    bias = jnp.linspace(-3, 2, N)
    options = {
        "query_positions": jnp.asarray(QUERIES),
        "key_positions": jnp.asarray(POSITIONS[:, None]),
        "scale": 0.4,
    }
    together, _ = attend(
        **x, normalizer=normalizers.Sigmoid(), normalizer_params={"bias": bias}, **options
    )
    for n in (0, 4):
        alone, _ = attend(**x, normalizer=normalizers.Sigmoid(bias=float(bias[n])), **options)
        np.testing.assert_allclose(together[:, :, n], alone[:, :, n], rtol=0, atol=1e-6)


def test_bfloat16_computes_in_float32():
    x = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in arrays().items()}
    options = {
        "query_positions": jnp.asarray(QUERIES),
        "key_positions": jnp.asarray(POSITIONS[:, None]),
        "normalizer": normalizers.Softmax(),
        "scale": 0.4,
    }
    out, lse = attend(**x, **options)
    wide, want = attend(**{name: leaf.astype(jnp.float32) for name, leaf in x.items()}, **options)
    assert out.dtype == jnp.bfloat16 and lse is not None and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, want, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))


def test_cache_leaves_are_not_transposed():
    """[B, K, S, H] is read as it lies: at T == 1 nothing of its size is permuted."""
    x = {name: jnp.asarray(leaf) for name, leaf in arrays().items()}

    def run(query, key, value):
        return attend(
            query[:, :1],
            key,
            value,
            query_positions=jnp.asarray(QUERIES[:, :1]),
            key_positions=jnp.asarray(POSITIONS[:, None]),
            normalizer=normalizers.Softmax(),
            scale=0.4,
        )

    equations = jax.make_jaxpr(run)(**x).jaxpr.eqns
    sizes = [e.invars[0].aval.size for e in equations if e.primitive.name in ("transpose", "copy")]
    assert max(sizes, default=0) < x["value"].size


def test_int8_is_the_scaled_integer():
    """Attention on (int8, scale) leaves is attention on scale · int8."""
    draw = np.random.default_rng(3)
    x = {name: jnp.asarray(leaf) for name, leaf in arrays().items()}
    whole = {n: draw.integers(-127, 128, x[n].shape).astype(np.int8) for n in ("key", "value")}
    scales = {n: draw.uniform(0.005, 0.02, (B, K, S)).astype(np.float32) for n in ("key", "value")}
    options: dict[str, Any] = {
        "query_positions": jnp.asarray(QUERIES),
        "key_positions": jnp.asarray(POSITIONS[:, None]),
        "sink_query": x["query"] + 1,
        "num_sink_slots": 2,
        "normalizer": normalizers.Softmax1(),
        "scale": 0.4,
    }
    wide = {n: jnp.asarray(whole[n] * scales[n][..., None]) for n in whole}
    want, want_lse = attend(x["query"], **wide, **options)
    held = {n: jnp.asarray(leaf) for n, leaf in whole.items()}
    given = {f"{n}_scale": jnp.asarray(scale) for n, scale in scales.items()}
    out, lse = attend(x["query"], **held, **given, **options)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(out, want, rtol=0, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match="both"):
        attend(x["query"], **held, **options)
    with pytest.raises(ValueError, match="neither"):
        attend(**x, **given, **options)


def test_quantize():
    """Ties to even, the largest at ±127, zeros at scale 1, and never more than half a step off."""
    x = np.random.default_rng(4).normal(size=(3, 5, 7)).astype(np.float32)
    x[0, 1] = 0
    x[2, 3] = [0.5, 1.5, 2.5, -0.5, -1.5, 127, -3]
    whole, scale = int8.quantize(jnp.asarray(x))
    assert whole.dtype == jnp.int8 and scale.shape == (3, 5) and scale[0, 1] == 1
    np.testing.assert_array_equal(whole[2, 3], [0, 2, 2, 0, -2, 127, -3])
    np.testing.assert_array_equal(np.abs(whole).max(-1) == 127, np.abs(x).max(-1) > 0)
    off = np.abs(int8.dequantize(whole, scale) - x)
    assert (off <= 0.5001 * scale[..., None]).all() and off.max() > 0


@pytest.mark.parametrize("quantised", [False, True])
def test_a_step_writes_then_attends(quantised):
    """Against a write by hand; outside the cache, on either side, nothing is written."""
    draw = np.random.default_rng(5).normal
    x = arrays()
    new: dict[str, Any] = {"key": draw(size=(2, 1, K, H)), "value": draw(size=(2, 1, K, V))}
    new |= {n: leaf.astype(np.float32) for n, leaf in new.items()}
    options: dict[str, Any] = {
        "query_positions": jnp.asarray(QUERIES[:, :1]),
        "key_positions": jnp.asarray(POSITIONS[:, None]),
        "window": 9,
        "normalizer": normalizers.Softmax(),
        "scale": 0.4,
    }
    held: dict[str, Any] = {n: x[n] for n in ("key", "value")}
    if quantised:
        for n in ("key", "value"):
            held[n], held[f"{n}_scale"] = int8.quantize(jnp.asarray(x[n]))
            new[f"{n}_scale"] = int8.quantize(jnp.asarray(new[n]))[1]
    for slots in [(5, 0), (-1, 3), (S, S + 1)]:
        want = {n: np.array(leaf) for n, leaf in held.items()}
        for b, slot in enumerate(slots):
            if 0 <= slot < S:
                for n, leaf in want.items():
                    token = new[n]
                    if leaf.dtype == np.int8:
                        token = int8.quantize(jnp.asarray(token))[0]
                    leaf[b, :, slot] = token[b, 0]
        want = {n: jnp.asarray(leaf) for n, leaf in want.items()}
        query = jnp.asarray(x["query"][:, :1])
        step = decode.decode_step(
            query, jnp.asarray(new["key"]), jnp.asarray(new["value"]),
            **{n: jnp.asarray(leaf) for n, leaf in held.items()}, slots=jnp.array(slots), **options,
        )  # fmt: skip
        for n, leaf in want.items():
            np.testing.assert_array_equal(getattr(step, n), leaf, err_msg=f"{n} {slots}")
        out, lse = attend(query, **want, **options)
        np.testing.assert_allclose(step.out, out, rtol=0, atol=1e-6)
        np.testing.assert_allclose(step.lse, lse, rtol=0, atol=1e-6)
