"""Streaming is dense attention over the whole text, however the stream is cut."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec, SinkWindow
from sinkjax.ops.rope import Rope

N, K, H = 6, 2, 14
P, W = 3, 11
C = P + W
TEXT = 71  # more than five turns of the ring
ROPE = Rope(head_dim=H)

NORMALIZERS = {
    # name -> (library spelling, the oracle's name and parameter, learned sink logits)
    "softmax": ("softmax", "softmax", None, False),
    "softmax1": ("softmax1", "softmax1", None, False),
    "softmax_n": ("softmax_n(n=2.5)", "softmax_n", 2.5, False),
    "sink logits": ("softmax", "softmax", None, True),
    "sigmoid": ("sigmoid(bias=-2.0)", "sigmoid", -2.0, False),
    "softpick": ("softpick", "softpick", None, False),
}


def text(seed, rows=1, length=TEXT):
    """Query, key and value of `rows` texts, float64."""
    draw = np.random.default_rng(seed).standard_normal
    return draw((rows, length, N, H)) * 1.7, draw((rows, length, K, H)), draw((rows, length, K, H))


SINKS = np.linspace(-2.0, 3.0, N)


@functools.partial(jax.jit, static_argnames=("rope", "normalizer", "scale", "logits_soft_cap"))
def step(cache, query, key, value, positions, sinks=None, **options):
    out, state = caches.attend(cache.layer(0), query, key, value, positions, sinks=sinks, **options)
    return out, cache.advance([state], positions)


def stream(cache, inputs, sizes, **options):
    """Cut the text into chunks of the given sizes, repeated; the last is padded to its size."""
    outputs, start = [], 0
    length = inputs[0].shape[1]
    for size in itertools.cycle(sizes):
        part = [np.asarray(x[:, start : start + size]) for x in inputs]
        have = part[0].shape[1]
        part = [np.pad(x, ((0, 0), (0, size - have), (0, 0), (0, 0))) for x in part]
        positions = np.where(np.arange(size) < have, np.arange(start, start + size), -1)
        positions = np.broadcast_to(positions, (part[0].shape[0], size)).astype(np.int32)
        out, cache = step(cache, *part, positions, **options)
        outputs.append(np.asarray(out)[:, :have])
        start += have
        if start == length:
            return np.concatenate(outputs, axis=1), cache
    raise AssertionError("no sizes")


def make(description, rows=1, dtype=jnp.float32, **spec):
    return caches.create(description, [LayerSpec(K, H, **spec)], rows, dtype=dtype)


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# Every normaliser meets every position mode, and every size every mode and two normalisers: each
# (normaliser, mode, size) is a compiled program, so not all of them.
CUTS = [(1,), (7,), (W - 1,), (W,), (W + 1,), (C + 6,)]
TABLE = [
    (name, mode, CUTS[(i + 2 * j + 1) % len(CUTS)])
    for i, name in enumerate(NORMALIZERS)
    for j, mode in enumerate(["cache_relative", "absolute"])
]


def options_of(name):
    spelling, oracle_name, parameter, learned = NORMALIZERS[name]
    library = {"normalizer": spelling, "rope": ROPE}
    dense = {"normalizer": oracle_name, "parameter": parameter}
    if learned:
        dense["sinks"] = SINKS
    return library, dense, learned


@pytest.mark.parametrize(("name", "mode", "sizes"), TABLE)
def test_streaming_is_the_closed_form(oracle, name, mode, sizes):
    library, dense, learned = options_of(name)
    inputs = [x.astype(np.float32) for x in text(0)]
    cache = make(SinkWindow(P, W, mode))
    sinks = jnp.asarray(SINKS, jnp.float32) if learned else None
    out, after = stream(cache, inputs, sizes, sinks=sinks, **library)
    cap = C - 1 if mode == "cache_relative" else None
    want = oracle.attention(
        *(x[0] for x in inputs), window=W, num_sink_tokens=P, position_cap=cap, **dense
    )
    close(out[0], want, 1e-5)
    assert after.time.tolist() == [TEXT]
    assert sorted(np.asarray(after.positions[0])[0]) == [*range(P), *range(TEXT - W, TEXT)]


@pytest.mark.parametrize(
    ("name", "mode", "sizes"),
    [(name, mode, CUTS[-1 - CUTS.index(cut)]) for name, mode, cut in TABLE],
)
def test_streaming_is_the_closed_form_in_float64(x64, oracle, name, mode, sizes):
    library, dense, learned = options_of(name)
    inputs = text(1)
    cache = make(SinkWindow(P, W, mode), dtype=jnp.float64)
    sinks = jnp.asarray(SINKS) if learned else None
    out, _ = stream(cache, inputs, sizes, sinks=sinks, **library)
    cap = C - 1 if mode == "cache_relative" else None
    want = oracle.attention(
        *(x[0] for x in inputs), window=W, num_sink_tokens=P, position_cap=cap, **dense
    )
    assert out.dtype == np.float64
    close(out[0], want, 1e-10)


def test_a_mixed_cut_in_float64(x64, oracle):
    inputs = text(2)
    want = oracle.attention(
        *(x[0] for x in inputs), window=W, num_sink_tokens=P, position_cap=C - 1
    )
    cache = make(SinkWindow(P, W), dtype=jnp.float64)
    out, _ = stream(cache, inputs, (1, C + 6, 7, 1), rope=ROPE)
    close(out[0], want, 1e-10)


def test_position_modes_differ(oracle):
    """Otherwise the two closed forms would not be told apart by the tests above."""
    inputs = [x[0] for x in text(0)]
    mask = {"window": W, "num_sink_tokens": P}
    relative = oracle.attention(*inputs, **mask, position_cap=C - 1)
    absolute = oracle.attention(*inputs, **mask)
    np.testing.assert_array_equal(relative[:C], absolute[:C])
    assert np.abs(relative - absolute)[C:].max() > 0.1


@pytest.mark.parametrize(
    ("description", "options", "dense"),
    [
        (SinkWindow(0, W), {}, {"window": W}),
        (SinkWindow(P, 1), {}, {"window": 1, "num_sink_tokens": P, "position_cap": P}),
        (SinkWindow(0, 1), {}, {"window": 1}),
        (
            SinkWindow(P, W),
            {"rope": None},
            {"window": W, "num_sink_tokens": P, "theta": None},
        ),
        (
            SinkWindow(P, W),
            {"scale": 0.31, "logits_soft_cap": 2.0},
            {
                "window": W,
                "num_sink_tokens": P,
                "position_cap": C - 1,
                "scale": 0.31,
                "logits_soft_cap": 2.0,
            },
        ),
        (
            SinkWindow(P, W),
            {"rope": Rope(head_dim=H, theta=500.0)},
            {"window": W, "num_sink_tokens": P, "position_cap": C - 1, "theta": 500.0},
        ),
        (Full(TEXT), {}, {}),
    ],
)
def test_corners(oracle, description, options, dense):
    inputs = [x.astype(np.float32) for x in text(3)]
    out, _ = stream(make(description), inputs, (1, W), **({"rope": ROPE} | options))
    close(out[0], oracle.attention(*(x[0] for x in inputs), **dense), 1e-5)


@pytest.mark.parametrize(
    ("description", "spec", "dense"),
    [
        # its own smaller window, with and without sink tokens: exactly the trained mask
        (SinkWindow(P, W), {"window": 5}, {"window": 5}),
        (
            SinkWindow(P, W),
            {"window": 5, "num_sink_tokens": 2},
            {"window": 5, "num_sink_tokens": 2, "position_cap": C - 1},
        ),
        (SinkWindow(P, W), {"window": W}, {"window": W}),
        # a larger window: what the description keeps
        (
            SinkWindow(P, W),
            {"window": W + 1, "num_sink_tokens": 1},
            {"window": W, "num_sink_tokens": P, "position_cap": C - 1},
        ),
        (
            Full(TEXT),
            {"window": 9, "num_sink_tokens": 2},
            {"window": 9, "num_sink_tokens": 2},
        ),
        (
            Full(TEXT),
            {"window": TEXT - 1, "num_sink_tokens": 2},
            {"window": TEXT - 1, "num_sink_tokens": 2},
        ),
        (Full(TEXT), {"window": TEXT + 5}, {}),
    ],
)
def test_layers_with_a_window_of_their_own(oracle, description, spec, dense):
    inputs = [x.astype(np.float32) for x in text(4)]
    cache = make(description, **spec)
    out, after = stream(cache, inputs, (7, 1), rope=ROPE)
    close(out[0], oracle.attention(*(x[0] for x in inputs), **dense), 1e-5)
    assert after.capacity == after.layers[0].key.shape[2] <= description.capacity


def test_rows_of_different_age(oracle):
    """Three texts that begin at different times, padding anywhere; each as if it were alone."""
    rows, starts, size = 3, (0, 2, 6), 8
    draw = np.random.default_rng(6)
    texts = [x.astype(np.float32) for x in text(5, rows)]
    cache = make(SinkWindow(P, W), rows=rows)
    got: list[list[np.ndarray]] = [[] for _ in range(rows)]
    for turn in range(18):
        # What padding holds must not matter.
        part = [np.full((rows, size, *x.shape[2:]), np.nan, np.float32) for x in texts]
        positions = np.full((rows, size), -1, np.int32)
        for row in range(rows):
            count = (
                min(draw.integers(0, size + 1), TEXT - len(got[row])) if turn >= starts[row] else 0
            )
            columns = np.sort(draw.choice(size, count, replace=False))
            tokens = len(got[row]) + np.arange(count)
            positions[row, columns] = tokens
            for source, target in zip(texts, part, strict=True):
                target[row, columns] = source[row, tokens]
        out, cache = step(cache, *part, positions, rope=ROPE)
        np.testing.assert_array_equal(np.asarray(out)[positions < 0], 0)
        for row in range(rows):
            got[row].extend(np.asarray(out)[row][positions[row] >= 0])
    lengths = [len(x) for x in got]
    assert lengths[0] == TEXT and len(set(lengths)) == rows and min(lengths) > 2 * C
    assert cache.time.tolist() == lengths
    for row in range(rows):
        one = [x[row, : lengths[row]] for x in texts]
        want = oracle.attention(*one, window=W, num_sink_tokens=P, position_cap=C - 1)
        close(np.stack(got[row]), want, 1e-5)


def test_one_token_is_the_general_path():
    """T == 1 writes first and never concatenates; a chunk of one token and one padding does not."""
    inputs = [x.astype(np.float32) for x in text(7)]
    slow = fast = make(SinkWindow(P, W))
    for t in range(2 * C):
        one = [x[:, t : t + 1] for x in inputs]
        two = [np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in one]
        out, fast = step(fast, *one, np.asarray([[t]], np.int32), rope=ROPE)
        general, slow = step(slow, *two, np.asarray([[t, -1]], np.int32), rope=ROPE)
        np.testing.assert_allclose(out, general[:, :1], rtol=0, atol=2e-6)
        for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_chunk_of_padding_changes_nothing():
    inputs = [x.astype(np.float32) for x in text(8, length=C + 6)]
    _, cache = stream(make(SinkWindow(P, W)), inputs, (C + 6,), rope=ROPE)
    for size in (1, 7):
        padding = [x[:, :size] * np.nan for x in inputs]
        out, after = step(cache, *padding, np.full((1, size), -1, np.int32), rope=ROPE)
        np.testing.assert_array_equal(out, 0)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
            np.testing.assert_array_equal(a, b)


def test_jit_is_eager():
    inputs = [x.astype(np.float32) for x in text(9, length=7)]
    positions = np.arange(7, dtype=np.int32)[None]
    cache = make(SinkWindow(P, W))
    jitted, _ = step(cache, *inputs, positions, rope=ROPE)
    query, key, value = map(jnp.asarray, inputs)
    eager, _ = caches.attend(cache.layer(0), query, key, value, jnp.asarray(positions), rope=ROPE)
    np.testing.assert_allclose(jitted, eager, rtol=0, atol=2e-6)


def test_bfloat16_cache_is_chunk_invariant():
    """A token is rounded as stored before its own chunk sees it."""
    inputs = [x.astype(np.float32) for x in text(10)]
    outs = [
        stream(make(SinkWindow(P, W), dtype=jnp.bfloat16), inputs, sizes, rope=ROPE)[0]
        for sizes in ((1,), (C + 6,))
    ]
    np.testing.assert_allclose(*outs, rtol=0, atol=5e-6)


def test_the_stream_may_be_millions_of_tokens_old(oracle):
    """Shift the clock by 16,000,000: outputs depend on distances only (sinks held by the cache)."""
    inputs = [x.astype(np.float32) for x in text(11)]
    _, cache = stream(make(SinkWindow(P, W)), [x[:, :P] for x in inputs], (P,), rope=ROPE)
    far = 16_000_000
    outs = []
    for offset in (C, far):
        old, got = cache, []
        for t in range(W + 2):
            one = [x[:, P + t : P + t + 1] for x in inputs]
            out, old = step(old, *one, np.asarray([[offset + t]], np.int32), rope=ROPE)
            got.append(np.asarray(out))
        outs.append(np.concatenate(got, axis=1))
    np.testing.assert_allclose(*outs, rtol=0, atol=2e-5)


def test_a_full_cache_refuses_in_jit():
    inputs = [x.astype(np.float32) for x in text(12, length=9)]
    out, cache = step(make(Full(7)), *inputs, np.arange(9, dtype=np.int32)[None], rope=ROPE)
    assert np.isfinite(out[:, :7]).all() and np.isnan(out[:, 7:]).all()
    assert np.isfinite(cache.layers[0].key).all()
    np.testing.assert_array_equal(cache.positions[0], [np.arange(7)])
    one = [x[:, :1] for x in inputs]
    out, _ = step(cache, *one, cache.next_positions(1), rope=ROPE)
    assert np.isnan(out).all()


def test_the_clock_refuses_to_pass_int32():
    inputs = [x.astype(np.float32) for x in text(13, rows=2, length=2)]
    cache = make(SinkWindow(P, W), rows=2)
    end = 2**31 - 1
    cache = dataclasses.replace(cache, time=jnp.asarray([end - 1, 5], jnp.int32))
    positions = cache.next_positions(2)
    np.testing.assert_array_equal(positions, [[end - 1, -2], [5, 6]])
    out, cache = step(cache, *inputs, positions, rope=ROPE)
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all() and np.isfinite(out[1]).all()
    assert cache.time.tolist() == [end, 7]
    out, cache = step(cache, *inputs, cache.next_positions(2), rope=ROPE)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    assert cache.time.tolist() == [end, 9]


def test_a_cache_made_for_another_layer_is_refused():
    view = make(SinkWindow(P, W), window=5, num_sink_tokens=2).layer(0)
    query, key, value = (jnp.asarray(x, jnp.float32) for x in text(14, length=3))
    positions = jnp.arange(3)[None]
    right = {"rope": None, "window": 5, "num_sink_tokens": 2}
    jax.eval_shape(
        lambda q, k, v, p: caches.attend(view, q, k, v, p, **right), query, key, value, positions
    )
    with pytest.raises(ValueError, match=r"made for \(5, 2\), got \(6, 2\)"):
        caches.attend(view, query, key, value, positions, rope=None, window=6, num_sink_tokens=2)
    with pytest.raises(ValueError, match=r"\[1, 2, 14\], got \[1, 6, 14\]"):
        caches.attend(view, query, query, query, positions, rope=None)
