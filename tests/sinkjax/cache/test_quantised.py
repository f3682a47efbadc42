"""A quantised cache is dense attention over the keys it stored, under the rule it states."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec, PerLayer, SinkWindow
from sinkjax.cache.quantised import Quantised
from sinkjax.cache.quantised_ring import QuantisedRing
from sinkjax.models import Decoder, DecoderConfig
from sinkjax.ops.rope import Rope

N, K, H = 6, 2, 14
P, W, G, R = 3, 29, 5, 6  # G: tokens in a group
LENGTHS = (97, 61, 18)  # tokens of three rows; the first goes round the body several times
PINS = (1, 17, 33)
JUMP, BY = 40, 9  # where positions jump, so that a group is left incomplete
ROPE = Rope(head_dim=H)


@functools.partial(jax.jit, static_argnames=("window",))
def step(cache, query, key, value, positions, log_forget=None, window=None):
    out, state = caches.attend(
        cache.layer(0), query, key, value, positions, rope=ROPE, log_forget=log_forget
    )
    return out, cache.advance([state], positions)


def text(seed, length, loud=1.0):
    """query, key, value, log forget gates [T, heads, H]; one channel shifted, the first key loud."""
    draw = np.random.default_rng(seed)
    query, key, value = (draw.normal(size=(length, heads, H)) for heads in (N, K, K))
    key[:, :, 3] += 5
    key[0] *= loud
    return query, key, value, np.log(draw.uniform(0.8, 1, size=(length, N)))


def positions_of(length):
    at = np.arange(length)
    return np.where(at < JUMP, at, at + BY)


def coded(x, bits, axis):
    """KIVI in numpy: what is read back, and the scale."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale > 0, scale, 1)
    return low + scale * np.round((x - low) / scale), np.broadcast_to(scale, x.shape)


def dense(
    oracle,
    text,
    at,
    *,
    bits,
    first,
    window,
    sinks: Any = 0,
    cap=None,
    residual: Any = R,
    forget: Any = False,
    pins=None,
):
    """[T, N, H] in float64: query t meets a key quantised when the last position of its group is R
    or more behind. Pins below `sinks` are sinks like the first tokens; a later one is met where it
    is, and in cache_relative as sink j once it has left the window."""
    query, key, value, fade = text
    raw, key = key, oracle.rotate(key, at)
    old_key, old_value = key.copy(), coded(value, bits, -1)[0]
    alone = at < first if pins is None else np.isin(at, pins)
    group = np.where(alone, -1, (at - first) // G)
    for one in np.unique(group[group >= 0]):
        old_key[group == one] = coded(key[group == one], bits, 0)[0]
    last = np.where(group >= 0, first + group * G + G - 1, 10**9)
    old = at[:, None] - last[None, :] >= residual
    distance = at[:, None] - at[None, :]
    is_sink = at < sinks if pins is None else alone & ((at < sinks) | (cap is None))
    slot, late = at, np.zeros_like(distance, bool)
    if pins is not None and cap is not None:
        slot = np.where(alone & ~is_sink, np.searchsorted(pins, at), 0)
        late = (alone & ~is_sink)[None] & (distance >= window)
    at_slot = oracle.rotate(raw, slot)
    near = oracle.rotate(query, at if cap is None else np.minimum(at, cap))
    query = oracle.rotate(query, at)
    seen = (distance >= 0) & ((distance < window) | is_sink[None] | late)
    out = []
    for head in range(N):
        k = head // (N // K)
        logits = np.where(old, query[:, head] @ old_key[:, k].T, query[:, head] @ key[:, k].T)
        at_sinks = np.where(old, near[:, head] @ old_key[:, k].T, near[:, head] @ key[:, k].T)
        logits = np.where(is_sink[None], at_sinks, logits)
        logits = np.where(late, near[:, head] @ at_slot[:, k].T, logits) * H**-0.5
        if forget:
            total = fade[:, head].cumsum()
            logits = logits + total[:, None] - total[None, :]
        weights = oracle.normalize("softmax", logits, seen)
        out.append((weights * old) @ old_value[:, k] + (weights * ~old) @ value[:, k])
    return np.stack(out, axis=1)


def leaves(body):
    """Codes, scales and zeros as [B, n, …]."""
    return [np.asarray(leaf).swapaxes(1, 2) for leaf in jax.tree.leaves((body.key, body.value))]


def run(description, size, texts, *, dtype: Any = np.float64, forget=False, seed=0):
    """Every row takes a few tokens at a time, padding anywhere. Outputs per row, the cache, and the
    bytes of every group that was ever in the body, which must not change while they are there."""
    rows = len(texts)
    cache = caches.create(
        description, [LayerSpec(K, H, num_forget_heads=N if forget else 0)], rows, dtype=dtype
    )
    if cache.num_pins:
        cache = cache.pin(PINS)
    draw = np.random.default_rng(seed)
    got: list[list[np.ndarray]] = [[] for _ in range(rows)]
    groups: dict[tuple[int, int], list[np.ndarray]] = {}
    while any(len(one) < len(words[0]) for one, words in zip(got, texts, strict=True)):
        part = [np.full((rows, size, *x.shape[1:]), np.nan, x.dtype) for x in texts[0]]
        positions = np.full((rows, size), -1, np.int32)
        for row, words in enumerate(texts):
            have = len(got[row])
            end = len(words[0]) if have >= JUMP else min(len(words[0]), JUMP)
            count = min(draw.integers(size // 2, size + 1), end - have)
            columns = np.sort(draw.choice(size, count, replace=False))
            positions[row, columns] = positions_of(end)[have : have + count]
            for source, target in zip(words, part, strict=True):
                target[row, columns] = source[have : have + count]
        fade = part.pop()
        out, cache = step(cache, *part, positions, fade if forget else None)
        out = np.asarray(out)
        np.testing.assert_array_equal(out[positions < 0], 0)
        body = cache.layers[0].body
        held, now = np.asarray(body.positions)[:, 0].max(-1), leaves(body)
        for row in range(rows):
            got[row].extend(out[row][positions[row] >= 0])
            for place in np.flatnonzero(held[row] >= 0):
                content = [leaf[row, place] for leaf in now]
                before = groups.setdefault((row, int(held[row, place])), content)
                assert all(map(np.array_equal, before, content))
    return [np.stack(one) for one in got], cache, groups


def texts_of(dtype=np.float64, **kwargs):
    return [[x.astype(dtype) for x in text(row, n, **kwargs)] for row, n in enumerate(LENGTHS)]


# Name -> description, chunk size, text, forget gates, and what the oracle is told.
def window(mode: Any = "cache_relative", sinks: Any = P, **how: Any):
    return Quantised(SinkWindow(sinks, W, mode, P), group_size=G, residual=R, **how)


MASK: dict[str, Any] = {"window": W, "sinks": P, "cap": P + W - 1, "first": P}
ABSOLUTE = MASK | {"cap": None}
FULL: dict[str, Any] = {"window": 10**6, "first": 4}
CASES = {
    "one": (window(bits=2), 1, {}, True, MASK),
    "long": (window(bits=2), W + P + 6, {}, True, MASK),
    "unprotected": (
        Quantised(Full(LENGTHS[0] + BY + 7), 4, G, R, first_full_precision=0), 7, {"loud": 80}, False,
        FULL | {"first": 0},
    ),
}  # fmt: skip
SLOW = {
    "group": (window("absolute", bits=8), G, {}, False, ABSOLUTE),
    "full": (Quantised(Full(LENGTHS[0] + BY), 8, G, R), 7, {}, False, FULL),
    "full long": (Quantised(Full(LENGTHS[0] + BY), 2, G, R), 41, {}, True, FULL),
    "full one": (Quantised(Full(LENGTHS[0] + BY), 4, G, R), 1, {}, False, FULL),
    "sink one": (window(first_full_precision=0), 1, {}, False, MASK | {"first": 0}),
    "sink long": (window(first_full_precision=0), W + P + 6, {}, True, MASK | {"first": 0}),
    "less": (window(first_full_precision=1), 7, {}, False, MASK | {"first": 1}),
    "more": (window(first_full_precision=8), 7, {}, False, MASK | {"first": 8}),
    "pins": (window("absolute", "auto"), 7, {}, True, ABSOLUTE | {"first": 0, "pins": PINS}),
    "pins one": (window(sinks="auto"), 1, {}, True, MASK | {"first": 0, "pins": PINS}),
    "pins long": (window(sinks="auto"), W + P + 6, {}, True, MASK | {"first": 0, "pins": PINS}),
    "last token only": (
        Quantised(SinkWindow(P, W), 2, G, 1), 7, {}, False, MASK | {"residual": 1},
    ),
    "one group": (
        Quantised(SinkWindow(P, 17), 2, G, 14), 7, {}, False,
        {"window": 17, "sinks": P, "cap": P + 16, "first": P, "residual": 14},
    ),
}  # fmt: skip


@functools.lru_cache
def streamed(name):
    description, size, more, forget, _ = {**CASES, **SLOW}[name]
    return run(description, size, texts_of(**more), forget=forget)


def store_of(how, **spec) -> QuantisedRing:
    store = how.store(LayerSpec(K, H, **spec))
    assert isinstance(store, QuantisedRing)
    return store


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_is_attention_over_what_is_stored(x64, oracle, name):
    description, _, more, forget, mask = {**CASES, **SLOW}[name]
    got, cache, _ = streamed(name)
    assert cache.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    for row, words in enumerate(texts_of(**more)):
        at = positions_of(LENGTHS[row])
        told = mask | {"bits": description.bits, "forget": forget}
        want = dense(oracle, words, at, **told)
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-9)


def test_the_oracle_tells_the_rules_apart(oracle):
    """Otherwise the test above would not see a group that is quantised one token late."""
    words, at = texts_of()[0], positions_of(LENGTHS[0])
    right = dense(oracle, words, at, bits=4, **MASK)
    for change in ({"residual": R + 1}, {"first": P - 1}, {"bits": 8}, {"cap": None}):
        assert (
            np.abs(dense(oracle, words, at, **({"bits": 4, **MASK} | change)) - right).max() > 1e-3
        )


def test_what_is_stored_does_not_depend_on_the_cut(x64):
    (_, one, every), (_, long, _) = streamed("one"), streamed("long")
    a, b = one.layers[0], long.layers[0]
    np.testing.assert_array_equal(a.body.positions, b.body.positions)
    np.testing.assert_array_equal(a.tokens.positions, b.tokens.positions)
    for x, y in zip(leaves(a.body), leaves(b.body), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    there = np.asarray(a.tokens.positions)[..., None] >= 0
    np.testing.assert_allclose(
        np.where(there, a.tokens.key, 0), np.where(there, b.tokens.key, 0), rtol=0, atol=1e-12
    )
    # `run` compared the bytes of a group with those before, step for step, over turns of the ring.
    assert len({n for row, n in every if row == 0}) > 3 * store_of(one.description).turning
    last = int(positions_of(LENGTHS[0])[-1])
    held = np.asarray(a.body.positions)[0, 0]
    assert held.shape == (-(-(W - R) // G), G)
    left = (last - R - P + 1) // G * G + P  # first position that is in full precision
    np.testing.assert_array_equal(np.sort(held.ravel()), np.arange(left - held.size, left))
    recent = np.asarray(a.tokens.positions)[0, 0]
    np.testing.assert_array_equal(np.sort(recent[recent >= left]), np.arange(left, last + 1))


@pytest.mark.parametrize("name", ["one", "unprotected"])
def test_old_tokens_are_within_half_a_scale(x64, oracle, name):
    """What the oldest token is worth, and not how the text sounds."""
    description = CASES[name][0]
    _, cache, _ = streamed(name)
    body, worst = cache.layers[0].body, 0.0
    words, at = texts_of(**CASES[name][2])[0], positions_of(LENGTHS[0])
    key, value = oracle.rotate(words[1], at).swapaxes(0, 1), words[2].swapaxes(0, 1)
    shifts = np.arange(0, 8, description.bits)[:, None]
    codes = []
    for x in (body.key, body.value):
        packed = np.asarray(x.codes)[0].reshape(K, -1, G, 1, x.codes.shape[-1])
        bits = (packed >> shifts) & (2**description.bits - 1)
        codes.append(bits.reshape(K, -1, G, 8 // description.bits * packed.shape[-1])[..., :H])
    for place, group in enumerate(np.asarray(body.positions)[0, 0]):
        there = group >= 0
        if not there.any():
            continue
        index = np.searchsorted(at, group[there])
        for x, kind, code in ((key, body.key, codes[0]), (value, body.value, codes[1])):
            code = code[:, place][:, there]
            scale, zero = (
                np.asarray(leaf)[0, :, place].reshape(K, -1, leaf.shape[-1])
                for leaf in (kind.scale, kind.zero)
            )
            if scale.shape[1] > 1:
                scale, zero = scale[:, there], zero[:, there]
            error = np.abs(zero + code * scale - x[:, index])
            assert (error <= scale / 2 * (1 + 1e-9)).all()
            if x is key and there.sum() > 1:
                span = x[:, index].max(1) - x[:, index].min(1)
                np.testing.assert_allclose(scale[:, 0], span / (2**description.bits - 1), rtol=1e-9)
            worst = max(worst, (error / scale).max())
    assert worst > 0.4  # it is quantised


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_coarse_scales_and_groups_of_channels(oracle, dtype, symmetric):
    """What is read back stays within half a scale, and the stream within what the scales allow."""
    how = window(symmetric=symmetric, bits=8, value_group_size=7, scale_dtype="bfloat16")
    texts = texts_of()
    got, cache, _ = run(how, 7, [[x.astype(np.float32) for x in one] for one in texts], dtype=dtype)
    store, body, words = store_of(how), cache.layers[0].body, texts[0]
    assert body.key.scale.dtype == jnp.bfloat16 and body.value.scale.shape[-2:] == (2, 1)
    back = store.coding.decode(body, H, jnp.float32)
    at, place = positions_of(LENGTHS[0]), np.asarray(body.positions)[0, 0].ravel()
    index = np.searchsorted(at, place[place >= 0])
    for x, read, scale in (
        (oracle.rotate(words[1], at), back.key, np.repeat(body.key.scale[0, :, :, 0], G, axis=1)),
        (words[2], back.value, np.repeat(body.value.scale[0, ..., 0], 7, axis=-1)),
    ):
        error = np.abs(np.asarray(read)[0][:, place >= 0] - x.swapaxes(0, 1)[:, index])
        scale = np.asarray(scale, np.float32).reshape(K, -1, H)[:, place >= 0]
        rounded = np.abs(x.swapaxes(0, 1)[:, index]) * float(jnp.finfo(dtype).eps)
        assert (error <= scale * 0.501 + rounded).all()
    want = dense(oracle, words, at, bits=8, **MASK | {"residual": 10**6})
    np.testing.assert_allclose(got[0], want, rtol=0, atol=0.15)


def test_why_sinks_are_protected(x64, oracle):
    """A first key of eighty times the norm: what it loses, and whom it shares scales with."""
    mask = CASES["unprotected"][-1] | {"bits": 4}
    words, at = texts_of(loud=80)[0], positions_of(LENGTHS[0])
    exact = dense(oracle, words, at, **(mask | {"residual": 10**6}))
    old = at >= P + 2 * G + R
    stored, _, _ = streamed("unprotected")
    protected = dense(oracle, words, at, **(mask | {"first": 4}))

    def error(out):
        return np.sqrt(np.square(out - exact)[old].mean())

    assert error(stored[0]) > 5 * error(protected)


def test_bytes():
    kept = SinkWindow(4, 4092)

    def made(description):
        specs = [LayerSpec(8, 128)]
        return jax.eval_shape(lambda: caches.create(description, specs, 2, dtype=jnp.bfloat16))

    plain = made(kept)
    for bits, symmetric, channels, scales in (
        (8, False, None, 2),
        (4, True, None, 1),
        (2, False, 32, 2),
    ):
        cache = made(Quantised(kept, bits, value_group_size=channels, symmetric=symmetric))
        full = 4 + 160  # sinks; R + g rounded to groups
        body = 32 * -(-(4092 - 128) // 32)
        per_head = 2 * full * 128 * 2  # key and value, bfloat16
        per_head += 2 * body * 128 * bits // 8
        per_head += scales * 2 * (body // 32 * 128 + body * 128 // (channels or 128))
        assert cache.nbytes == 2 * (8 * per_head + 4 * (full + body) + 4)
        assert cache.nbytes < plain.nbytes * {8: 0.6, 4: 0.35, 2: 0.27}[bits]
        assert cache.capacity == plain.capacity


def test_padding_changes_nothing(x64):
    _, cache, _ = streamed("unprotected")
    rows = len(LENGTHS)
    nothing = [np.full((rows, 7, heads, H), np.nan) for heads in (N, K, K)]
    out, after = step(cache, *nothing, np.full((rows, 7), -1, np.int32), None)
    np.testing.assert_array_equal(out, 0)
    for a, b in zip(*map(jax.tree.leaves, (after, cache)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_reset_empties_a_row(x64):
    _, cache, _ = streamed("unprotected")
    empty = caches.create(cache.description, cache.specs, 1, dtype=jnp.float64)
    reset = cache.reset_rows(jnp.asarray([False, True, False]))
    for old, fresh, new in zip(*map(jax.tree.leaves, (cache, empty, reset)), strict=True):
        np.testing.assert_array_equal(new[1], fresh[0])
        np.testing.assert_array_equal(new[::2], old[::2])


def test_a_jump_within_a_chunk_is_refused(x64):
    """There would be no room for the groups between; between chunks a clock may jump."""
    _, cache, _ = streamed("unprotected")
    chunk = [np.ones((3, 7, heads, H)) for heads in (N, K, K)]
    positions = np.asarray(cache.next_positions(7)) + 0
    positions[1, 4:] += 1
    out, _ = step(cache, *chunk, positions, None)
    np.testing.assert_array_equal(np.isnan(out).any((1, 2, 3)), [False, True, False])


def test_layers():
    how = Quantised(SinkWindow(4, 1020))
    assert store_of(how).first == 4 and store_of(how) == store_of(Quantised(SinkWindow(4, 1020)))
    assert store_of(how, window=512).plan.window == 512
    assert store_of(Quantised(Full(999))).first == 4
    # Nothing would ever leave the full-precision tokens.
    assert how.store(LayerSpec(2, 16, window=128)) == how.inner.store(LayerSpec(2, 16, window=128))
    assert Quantised(Full(150)).store(LayerSpec(2, 16)) == Full(150).store(LayerSpec(2, 16))
    with pytest.raises(ValueError, match="value_group_size: expected to divide the head size 16"):
        Quantised(Full(999), value_group_size=3).store(LayerSpec(2, 16))
    with pytest.raises(ValueError, match="first_full_precision: expected the 4 sink tokens"):
        Quantised(SinkWindow(4, 140), first_full_precision=0).store(LayerSpec(2, 16))
    with pytest.raises(ValueError, match="first_full_precision: expected None"):
        Quantised(SinkWindow("auto"), first_full_precision=4).store(LayerSpec(2, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "Quantised.bits: expected 2, 4 or 8, got 3"),
        ({"group_size": 0}, "Quantised.group_size: expected an integer of at least 1"),
        ({"residual": 0}, "Quantised.residual: expected an integer of at least 1"),
        ({"first_full_precision": -1}, "Quantised.first_full_precision"),
        ({"value_group_size": 0}, "Quantised.value_group_size"),
        ({"scale_dtype": "int8"}, "Quantised.scale_dtype: expected a float dtype, got 'int8'"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Quantised(**({"inner": Full(99)} | change))


@pytest.mark.slow
def test_a_decoder_streams_through_it(x64):
    """Beside a layer with another cache; the tokens of one at a time are those of the whole text."""
    config = DecoderConfig(
        vocab_size=19, model_dim=12, num_layers=2, num_heads=N, num_kv_heads=K, head_dim=H,
        mlp_dim=14, context_length=W + P, dtype="float64", param_dtype="float64",
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    keep = PerLayer((window(bits=2), SinkWindow(P, W)))
    graph, state = nnx.split(model)

    @jax.jit
    def take(cache, tokens):
        output = nnx.merge(graph, state)(tokens, cache=cache)
        return output.logits, output.cache

    tokens = np.random.default_rng(5).integers(0, 19, (2, 59))
    whole, _ = take(model.init_cache(keep, 2), tokens)
    outs, cache = [], model.init_cache(keep, 2)
    for t in range(tokens.shape[1]):
        out, cache = take(cache, tokens[:, t : t + 1])
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, 1), whole, rtol=0, atol=1e-9)
    exact, _ = take(model.init_cache(SinkWindow(P, W), 2), tokens)
    assert np.abs(exact - whole).max() > 1e-4
