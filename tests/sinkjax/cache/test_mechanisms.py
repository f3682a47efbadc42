"""Slots, position biases, forget gates and pairs of heads, streamed: dense attention on the text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax import ops
from sinkjax.cache import Full, LayerSpec, SinkWindow
from sinkjax.ops.rope import Rope
from sinkjax.ops.slots import Slots

N, K, H, m, R = 6, 2, 14, 3, 9
P, W = 3, 11
C = P + W
TEXT = 53
ROPE = Rope(head_dim=H)
SLOPES = np.array([2.0 ** (-8 * n / 3) for n in (1, 2, 3)] * 2) * [1, 1, 1, -1, -1, -1]
SPEC = LayerSpec(K, H)
FORGETS = LayerSpec(K, H, num_forget_heads=N)


def draw(seed, rows=1, length=TEXT):
    """Query, key, value, log gates and token sinks of `rows` texts; slots and a distance table."""
    normal = np.random.default_rng(seed).standard_normal
    tokens = {
        "query": normal((rows, length, N, H)) * 1.7,
        "key": normal((rows, length, K, H)),
        "value": normal((rows, length, K, H)),
        "log_forget": -np.abs(normal((rows, length, N))) * 0.4,
        "sinks": normal((rows, length, N)),
    }
    layer = {
        "slot_key": normal((K, m, H)),
        "slot_value": normal((K, m, H)),
        "table": normal((N, R)),
    }
    return tokens, layer


def alibi(distance):
    return ops.alibi_bias(distance, ops.alibi_slopes(N, balanced=True))


MECHANISMS: dict[str, dict[str, Any]] = {
    "slots at the start, sink logits per token, alibi": dict(
        slots=("key_value", "start"), sinks=True, bias="alibi", normalizer="softmax"
    ),
    "context slots before rope, forget gates, distances, softmax1": dict(
        slots=("context", "none"), forget=True, bias="table", normalizer="softmax1"
    ),
    "pairs of heads, key slots, forget gates, alibi": dict(
        slots=("key", "start"), forget=True, bias="alibi", differential=True, normalizer="softmax"
    ),
    "value slots, sigmoid, alibi": dict(
        slots=("value", "start"), bias="alibi", normalizer="sigmoid(bias=-2.0)", rope=None
    ),
}


@functools.partial(jax.jit, static_argnames=("name", "padded"))
def step(cache, tokens, layer, positions, *, name, padded=False):
    """One chunk through one layer with the mechanisms of `name`."""
    chosen = MECHANISMS[name]
    tokens = dict(tokens)
    mode, position = chosen["slots"]
    if not chosen.get("sinks"):
        tokens.pop("sinks")
    if not chosen.get("forget"):
        tokens.pop("log_forget")

    def bias(distance):
        if chosen["bias"] == "alibi":
            return alibi(distance)
        return ops.learned_distance_bias(distance, layer["table"])

    out, state = caches.attend(
        cache.layer(0),
        positions=positions,
        rope=chosen.get("rope", ROPE),
        normalizer=chosen["normalizer"],
        slots=Slots(layer["slot_key"], layer["slot_value"], mode, position),
        position_bias=bias,
        differential=chosen.get("differential", False),
        **tokens,
    )
    return out, cache.advance([state], positions)


def dense(oracle, name, tokens, layer, row, length, **mask):
    chosen = MECHANISMS[name]
    one = {key: x[row, :length] for key, x in tokens.items()}
    normalizer, parameter = chosen["normalizer"], None
    if normalizer.startswith("sigmoid"):
        normalizer, parameter = "sigmoid", -2.0

    def table(distance):
        inside = (0 <= distance) & (distance < R)
        return np.where(inside, layer["table"][:, np.clip(distance, 0, R - 1)], 0)

    def linear(distance):
        return -SLOPES[:, None, None] * np.abs(distance)

    return oracle.attention(
        one["query"],
        one["key"],
        one["value"],
        normalizer=normalizer,
        parameter=parameter,
        sinks=one["sinks"] if chosen.get("sinks") else None,
        log_forget=one["log_forget"] if chosen.get("forget") else None,
        bias=linear if chosen["bias"] == "alibi" else table,
        slots=(layer["slot_key"], layer["slot_value"], *chosen["slots"]),
        differential=chosen.get("differential", False),
        theta=None if "rope" in chosen else 10000.0,
        **mask,
    )


def spec_of(name):
    return FORGETS if MECHANISMS[name].get("forget") else SPEC


def stream(name, cache, tokens, layer, size):
    outs, length = [], tokens["query"].shape[1]
    for start in range(0, length, size):
        have = min(size, length - start)
        part = {}
        for key, x in tokens.items():
            x = x[:, start : start + have]
            # What padding holds must not matter.
            wide = np.full((x.shape[0], size, *x.shape[2:]), np.nan, x.dtype)
            wide[:, :have] = x
            part[key] = wide
        positions = np.where(np.arange(size) < have, np.arange(start, start + size), -1)[None]
        out, cache = step(cache, part, layer, jnp.asarray(positions, jnp.int32), name=name)
        np.testing.assert_array_equal(np.asarray(out)[:, have:], 0)
        outs.append(np.asarray(out)[:, :have])
    return np.concatenate(outs, axis=1), cache


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


FIRST, SECOND, THIRD, FOURTH = MECHANISMS
# Each (mechanisms, mode, size) is a compiled program, so not all of them.
TABLE = [
    (FIRST, "cache_relative", (1, 5, C + 6)),
    (FIRST, "absolute", (C + 6,)),
    (SECOND, "cache_relative", (1, 5)),
    (SECOND, "absolute", (C + 6,)),
    (THIRD, "cache_relative", (C + 6,)),
    (THIRD, "absolute", (1,)),
    (FOURTH, "cache_relative", (5,)),
]


@pytest.mark.parametrize(("name", "mode", "sizes"), TABLE)
def test_streaming_is_the_closed_form(x64, oracle, name, mode, sizes):
    tokens, layer = draw(0)
    cap = C - 1 if mode == "cache_relative" else None
    mask = {"window": W, "num_sink_tokens": P, "position_cap": cap}
    want = dense(oracle, name, tokens, layer, 0, TEXT, **mask)
    for size in sizes:
        cache = caches.create(SinkWindow(P, W, mode), [spec_of(name)], 1, dtype=jnp.float64)
        out, _ = stream(name, cache, tokens, layer, size)
        close(out[0], want, 1e-10)


def test_every_term_matters(oracle):
    """Otherwise the closed form above would not notice that one of them is missing."""
    tokens, layer = draw(0)
    name = THIRD
    mask = {"window": W, "num_sink_tokens": P, "position_cap": C - 1}
    want = dense(oracle, name, tokens, layer, 0, TEXT, **mask)
    for changes in (
        {"position_cap": None},
        {"position_cap": C},
        {"logits_soft_cap": 3.0},
    ):
        assert (
            np.abs(dense(oracle, name, tokens, layer, 0, TEXT, **mask | changes) - want).max()
            > 1e-3
        )
    for key, x in (tokens | layer).items():
        if key in ("sinks", "slot_value", "table"):
            continue
        place = tokens if key in tokens else layer
        other = dense(oracle, name, *(p | {key: x * 0.9} if p is place else p for p in (tokens, layer)),
                      0, TEXT, **mask)  # fmt: skip
        assert np.abs(other - want).max() > 1e-3, key


def test_rows_of_different_age(oracle):
    """Two texts that begin at different times, padding anywhere; each as if it were alone."""
    name = SECOND
    rows, size = 2, 8
    rng = np.random.default_rng(6)
    tokens, layer = draw(5, rows)
    tokens = {key: x.astype(np.float32) for key, x in tokens.items()}
    small = {key: jnp.asarray(x, jnp.float32) for key, x in layer.items()}
    cache = caches.create(SinkWindow(P, W), [FORGETS], rows)
    got: list[list[np.ndarray]] = [[] for _ in range(rows)]
    for turn in range(14):
        part = {
            key: np.full((rows, size, *x.shape[2:]), np.nan, np.float32)
            for key, x in tokens.items()
        }
        positions = np.full((rows, size), -1, np.int32)
        for row in range(rows):
            most = min(size, TEXT - len(got[row])) if turn >= 3 * row else 0
            count = rng.integers(0, most + 1)
            columns = np.sort(rng.choice(size, count, replace=False))
            index = len(got[row]) + np.arange(count)
            positions[row, columns] = index
            for key, x in tokens.items():
                part[key][row, columns] = x[row, index]
        out, cache = step(cache, part, small, positions, name=name)
        np.testing.assert_array_equal(np.asarray(out)[positions < 0], 0)
        for row in range(rows):
            got[row].extend(np.asarray(out)[row][positions[row] >= 0])
    assert (cache.layers[0].decay <= 0).all()
    lengths = [len(x) for x in got]
    assert len(set(lengths)) == rows and min(lengths) > 2 * C
    mask = {"window": W, "num_sink_tokens": P, "position_cap": C - 1}
    for row in range(rows):
        close(
            np.stack(got[row]), dense(oracle, name, tokens, layer, row, lengths[row], **mask), 2e-5
        )


def flash(tokens, sinks, slots, differential):
    """What a layer without a cache does: nothing of size [T, T] is added to the logits."""
    B, T = tokens["query"].shape[:2]
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    query, key = (ops.rotate(tokens[x], index, ROPE) for x in ("query", "key"))
    decay = ops.alibi_decay(index, ops.alibi_slopes(N, balanced=True))
    bias, shift = ops.decay_bias(decay + ops.cumulative_decay(tokens["log_forget"]))
    logits = ops.slot_logits(query if slots.position == "start" else tokens["query"], slots)
    normalizer, joined = ops.join_sinks("softmax", sinks, logits, shift=shift)
    value = ops.widen_values(tokens["value"]) if differential else tokens["value"]
    out, lse = ops.dot_product_attention(
        query, key, value, bias, is_causal=True, sinks=joined, normalizer=normalizer,
        return_residual=True,
    )  # fmt: skip
    return ops.add_slot_values(out, slots, logits, lse - shift)


@pytest.mark.parametrize("differential", [False, True])
def test_a_text_that_fits_is_attention_without_a_cache(x64, differential):
    tokens, layer = jax.tree.map(jnp.asarray, draw(9, rows=2, length=C))
    positions = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32), (2, C))
    several = jnp.asarray(np.random.default_rng(1).standard_normal((N, 2)))
    slots = Slots(layer["slot_key"], layer["slot_value"], "key_value", "none")
    if differential:
        slots = Slots(layer["slot_key"], None, "key", "start")

    @jax.jit
    def both(tokens):
        cached = []
        for description in (SinkWindow(P, W), Full(C)):
            cache = caches.create(description, [FORGETS], 2, dtype=jnp.float64)
            out, _ = caches.attend(
                cache.layer(0),
                tokens["query"],
                tokens["key"],
                tokens["value"],
                positions,
                rope=ROPE,
                sinks=several,
                slots=slots,
                position_bias=alibi,
                log_forget=tokens["log_forget"],
                differential=differential,
            )
            cached.append(out)
        return flash(tokens, several, slots, differential), cached

    want, (streamed, full) = both(tokens)
    close(full, want, 1e-10)
    close(streamed, want, 1e-10)


def test_decay_of_an_endless_stream_stays_exact():
    """The gates of 30,000 tokens add up to −10,000, whose last bit in float32 is 0.001."""
    length, size = 30_000, 3
    gates = -np.random.default_rng(2).uniform(0, 0.7, length).astype(np.float32)
    view = caches.create(SinkWindow(1, W), [LayerSpec(1, 2, num_forget_heads=1)], 1)
    zeros = jnp.zeros((1, size, 1, 2))

    def chunk(cache, gates):
        positions = cache.next_positions(size)
        _, state = caches.attend(
            cache.layer(0), zeros, zeros, zeros, positions, rope=None, log_forget=gates
        )
        return cache.advance([state], positions), None

    cache, _ = jax.jit(lambda cache, gates: jax.lax.scan(chunk, cache, gates))(
        view, jnp.asarray(gates.reshape(-1, 1, size, 1))
    )
    held = np.asarray(cache.positions[0])[0]
    later = [gates[p + 1 :].astype(np.float64).sum() for p in held]
    assert sorted(held) == [0, *range(length - W, length)] and later[0] < -10_000
    np.testing.assert_allclose(np.asarray(cache.layers[0].decay)[0, 0, 1:], later[1:], atol=3e-6)
    np.testing.assert_allclose(np.asarray(cache.layers[0].decay)[0, 0, 0], later[0], rtol=1e-3)


def test_an_order_sensitive_normaliser_reads_the_ring_in_order():
    """Stick-breaking goes from the newest key to the oldest, wherever the ring holds them."""
    tokens, _ = draw(12, length=3 * W)
    text = [jnp.asarray(tokens[key], jnp.float32) for key in ("query", "key", "value")]
    options: dict[str, Any] = {"normalizer": "stick_breaking"}

    @jax.jit
    def chunk(cache, query, key, value):
        positions = cache.next_positions(3)
        operands = query, key, value, positions
        out, state = caches.attend(cache.layer(0), *operands, rope=None, **options)
        return out, cache.advance([state], positions)

    cache, outs = caches.create(SinkWindow(0, W), [LayerSpec(K, H, window=W)], 1), []
    for start in range(0, 3 * W, 3):
        out, cache = chunk(cache, *(x[:, start : start + 3] for x in text))
        outs.append(out)
    whole: Any = jax.jit(
        functools.partial(
            ops.dot_product_attention, is_causal=True, local_window_size=(W - 1, 0), **options
        )
    )
    close(np.concatenate(outs, axis=1), np.asarray(whole(*text)), 1e-5)


def test_token_sinks_with_padding(oracle):
    tokens, _ = draw(11, length=7)
    small = {key: jnp.asarray(x, jnp.float32) for key, x in tokens.items()}
    cache = caches.create(SinkWindow(P, W), [SPEC], 1)
    positions = jnp.asarray([[0, 1, -1, 2, 3, -1, 4]])
    real = np.flatnonzero(positions[0] >= 0)
    sinks = jnp.where(positions[..., None] >= 0, small["sinks"], jnp.nan)
    operands = small["query"], small["key"], small["value"], positions
    attend = jax.jit(functools.partial(caches.attend, rope=ROPE))
    out, _ = attend(cache.layer(0), *operands, sinks=sinks)
    text = [tokens[key][0, real] for key in ("query", "key", "value")]
    close(np.asarray(out)[0, real], oracle.attention(*text, sinks=tokens["sinks"][0, real]), 1e-5)
    np.testing.assert_array_equal(out[0, [2, 5]], 0)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (SPEC, {"log_forget": jnp.zeros((1, 2, N))}, "made for 0 heads with a forget gate, got 6"),
        (FORGETS, {}, "made for 6 heads with a forget gate, got 0"),
        (SPEC, {"sinks": jnp.zeros(N), "normalizer": "softpick"}, "expected softmax, .*softpick"),
    ],
)
def test_bad_input(spec, options, message):
    cache = caches.create(SinkWindow(P, W), [spec], 1)
    query, key = jnp.zeros((1, 2, N, H)), jnp.zeros((1, 2, K, H))

    def call(cache, query, key):
        positions = cache.next_positions(2)
        return caches.attend(cache.layer(0), query, key, key, positions, rope=None, **options)[0]

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, cache, query, key)
