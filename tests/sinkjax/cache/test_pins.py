"""Pinned sink tokens, wherever they are in the text: equal to dense attention under their rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec, PerLayer, SinkWindow
from sinkjax.ops.positions import alibi_bias
from sinkjax.ops.rope import Rope

N, K, H = 4, 2, 6
P, W = 3, 11
C = P + W
TEXT = 61
ROPE = Rope(head_dim=H)
PINS = np.array(
    [
        [0, 1, 2],  # StreamingLLM
        [1, 9, 25],  # among the first P, within the first C, later
        [30, 31, -1],  # the first tokens are none
        [2, P, C],  # at the edges
    ]
)
B = len(PINS)
SLOPES = jnp.array([0.5, 0.3, 0.2, 0.1])


def text(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return draw((B, TEXT, N, H)) * 1.7, draw((B, TEXT, K, H)), draw((B, TEXT, K, H))


def met_at(t, i, pins, mode):
    """Positions of query and key where t meets i, or None: they do not meet."""
    if i > t:
        return None
    if i in pins and mode == "cache_relative":
        if i < P:
            return min(t, C - 1), i
        if t - i >= W:
            return C - 1, pins.index(i)
    return (t, i) if i in pins or t - i < W else None


def dense(oracle, query, key, value, pins, mode, *, slopes=None, log_forget=None):
    """[T, N, H] of one row, a pair of tokens at a time, float64."""
    out = np.zeros((TEXT, N, H))
    G = N // K
    turned = [oracle.rotate(x, np.arange(TEXT)) for x in (query, key)]

    def turn(x, position):
        return oracle.rotate(x[None], [position])[0]

    for t in range(TEXT):
        logits = np.full((N, t + 1), -np.inf)
        for i in range(t + 1):
            met = met_at(t, i, pins, mode)
            if met is None:
                continue
            if slopes is not None:
                q, k = query[t], key[i]
            elif met == (t, i):
                q, k = turned[0][t], turned[1][i]
            else:
                q, k = turn(query[t], met[0]), turn(key[i], met[1])
            logits[:, i] = np.einsum("nh,nh->n", q, np.repeat(k, G, axis=0)) / np.sqrt(H)
            if slopes is not None:
                logits[:, i] -= slopes * (met[0] - met[1])
            if log_forget is not None:
                logits[:, i] += log_forget[i + 1 : t + 1].sum(0)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[t] = np.einsum("ni,inh->nh", weights, np.repeat(value[: t + 1], G, axis=1))
    return out


@functools.partial(jax.jit, static_argnames=("rope", "bias"))
def step(cache, query, key, value, positions, rope, bias=False, log_forget=None):
    position_bias = functools.partial(alibi_bias, slopes=SLOPES) if bias else None
    out, state = caches.attend(
        cache.layer(0), query, key, value, positions,
        rope=rope, position_bias=position_bias, log_forget=log_forget,
    )  # fmt: skip
    return out, cache.advance([state], positions)


def stream(cache, inputs, size, rope=ROPE, log_forget=None, **options):
    outputs = []
    for start in range(0, TEXT, size):
        have = min(size, TEXT - start)
        part = [
            np.asarray(x[:, start : start + size]) for x in (*inputs, log_forget) if x is not None
        ]
        part = [np.pad(x, ((0, 0), (0, size - have), *((0, 0),) * (x.ndim - 2))) for x in part]
        positions = np.where(np.arange(size) < have, np.arange(start, start + size), -1)
        positions = np.broadcast_to(positions, (B, size)).astype(np.int32)
        if log_forget is not None:
            options["log_forget"] = part.pop()
        out, cache = step(cache, *part, positions, rope, **options)
        outputs.append(np.asarray(out)[:, :have])
    return np.concatenate(outputs, axis=1), cache


def make(mode="cache_relative", dtype=jnp.float32, **spec):
    description = SinkWindow("auto", W, mode, max_sink_tokens=P)
    return caches.create(description, [LayerSpec(K, H, **spec)], B, dtype=dtype)


@functools.cache
def wanted(oracle, mode):
    pins = [[p for p in row if p >= 0] for row in PINS.tolist()]
    return np.stack([dense(oracle, *(x[b] for x in text()), pins[b], mode) for b in range(B)])


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("cache_relative", 1),
        pytest.param("cache_relative", 7, marks=pytest.mark.slow),
        pytest.param("cache_relative", W, marks=pytest.mark.slow),
        ("cache_relative", C + 6),
        pytest.param("absolute", 1, marks=pytest.mark.slow),
        pytest.param("absolute", 7, marks=pytest.mark.slow),
        pytest.param("absolute", W, marks=pytest.mark.slow),
        ("absolute", C + 6),
    ],
)
def test_pins_are_the_closed_form(oracle, mode, size):
    inputs = [x.astype(np.float32) for x in text()]
    out, after = stream(make(mode).pin(PINS), inputs, size)
    want = wanted(oracle, mode)
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()
    held = np.asarray(after.positions[0].positions)
    for b in range(B):
        assert held[b, :P].tolist() == PINS[b].tolist()
        last = set(range(TEXT - W, TEXT))
        assert last <= set(held[b].tolist())
    np.testing.assert_array_equal(after.sink_positions, PINS)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, W, C + 6])
def test_pins_in_float64(x64, oracle, size):
    out, _ = stream(make(dtype=jnp.float64).pin(PINS), text(), size)
    want = wanted(oracle, "cache_relative")
    assert np.abs(out - want).max() <= 1e-10 * np.abs(want).max()


def test_the_first_tokens_pinned_are_streaming_llm(oracle):
    """Row 0 of the oracle above is the closed form of the library's other tests."""
    inputs = [x[0] for x in text()]
    want = oracle.attention(*inputs, window=W, num_sink_tokens=P, position_cap=C - 1)
    np.testing.assert_allclose(wanted(oracle, "cache_relative")[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, pytest.param(C + 6, marks=pytest.mark.slow)])
def test_distances_and_gates(oracle, size):
    """ALiBi counts the distance of the rule; a pin's gates go on closing while it is in its slot."""
    inputs = [x.astype(np.float32) for x in text(1)]
    closing = -np.abs(np.random.default_rng(2).standard_normal((B, TEXT, N))).astype(np.float32) / 9
    cache = make(num_forget_heads=N).pin(PINS)
    out, _ = stream(cache, inputs, size, rope=None, bias=True, log_forget=closing)
    for b in (1, 3):
        want = dense(
            oracle, *(x[b] for x in inputs), PINS[b].tolist(), "cache_relative",
            slopes=np.asarray(SLOPES), log_forget=closing[b],
        )  # fmt: skip
        assert np.abs(out[b] - want).max() <= 1e-5 * np.abs(want).max()


def test_pin_reset_and_refuse():
    cache = make()
    assert cache.num_pins == P
    np.testing.assert_array_equal(cache.sink_positions, np.full((B, P), -1))
    # Ascending, whatever the order; rows that are not meant keep theirs; the same inside jit.
    one = cache.pin([14, 0])
    np.testing.assert_array_equal(one.sink_positions, np.tile([0, 14, -1], (B, 1)))
    rows = np.arange(B) == 2
    two = jax.jit(lambda c, p: c.pin(p, rows=rows))(one, jnp.array([5]))
    assert two.sink_positions.tolist() == [[0, 14, -1]] * 2 + [[5, -1, -1], [0, 14, -1]]
    cleared = two.reset_rows(jnp.asarray(rows))
    assert cleared.sink_positions.tolist() == [[0, 14, -1]] * 2 + [[-1] * 3, [0, 14, -1]]
    assert jax.tree.map(jnp.copy, two).sink_positions.tolist() == two.sink_positions.tolist()

    with pytest.raises(ValueError, match="at most P=3"):
        cache.pin(np.zeros((B, P + 1), int))
    with pytest.raises(ValueError, match=r"each token once, got \[7, 7\]"):
        cache.pin([7, 7])
    old = dataclasses.replace(cache, time=jnp.array([0, 5, 0, 0]))
    with pytest.raises(ValueError, match="without tokens, got one at 5"):
        old.pin([7])
    old.pin([7], rows=rows)
    plain = caches.create(SinkWindow(4, W), [LayerSpec(K, H)], B)
    assert plain.num_pins == 0 and plain.sink_positions is None
    with pytest.raises(ValueError, match="no slots for pinned tokens"):
        plain.pin([0])


def test_layers_of_their_own_have_no_pins():
    """A layer that keeps its trained window, or another description, is left alone."""
    auto = SinkWindow("auto", W)
    assert (auto.sink_slots, auto.capacity) == (4, 4 + W)
    specs = [LayerSpec(K, H), LayerSpec(K, H, window=5, num_sink_tokens=1)]
    cache = caches.create(auto, specs, 1).pin([14])
    assert [x.pinned for x in cache.stores] == [True, False]
    assert len(cache.positions) == 2 and cache.positions[1].shape == (1, 6)
    mixed = caches.create(PerLayer((auto, Full(9))), [LayerSpec(K, H)] * 2, 1).pin([14])
    assert mixed.sink_positions.tolist() == [[14, -1, -1, -1]]
    with pytest.raises(ValueError, match="max_sink_tokens"):
        SinkWindow("auto", max_sink_tokens=0)
