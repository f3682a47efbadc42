"""Quest: the bound of a page, the pages that are read, and attention on just those."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec
from sinkjax.cache.paged import PagedTopK, Pages
from sinkjax.ops import alibi_bias, alibi_slopes
from sinkjax.ops.sparse import best_pages, page_bounds

B, N, K, H, V = 2, 6, 2, 5, 5
G, LENGTH, PAGE, PROMPT, STEPS = N // K, 46, 4, 29, 9
QUEST = PagedTopK(LENGTH, PAGE, num_pages=5, num_recent_pages=2, num_dense_layers=0)
SINKS = np.linspace(-1.0, 1.0, N).astype(np.float32)
SLOPES = alibi_slopes(N)


def text(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    shapes = [(B, PROMPT + STEPS, heads, H) for heads in (N, K, K)]
    return [draw(shape).astype(np.float32) * 1.5 for shape in shapes]


@functools.partial(jax.jit, static_argnames="differential")
def step(cache, query, key, value, positions, differential=False):
    out, state = caches.attend(
        cache.layer(0), query, key, value, positions, rope=None, logits_soft_cap=4.0,
        position_bias=lambda d: alibi_bias(d, SLOPES), differential=differential,
        sinks=None if differential else jnp.asarray(SINKS),
    )  # fmt: skip
    return out, cache.advance([state], positions)


def stream(description, **options):
    """The prompt in one chunk, of which row 1 has 6 tokens less, then single tokens."""
    cache = caches.create(description, [LayerSpec(K, H)], B)
    query, key, value = text()
    positions = np.broadcast_to(np.arange(PROMPT), (B, PROMPT)).astype(np.int32).copy()
    positions[1, -6:] = -1
    parts = [x[:, :PROMPT] for x in (query, key, value)]
    out, cache = step(cache, *parts, positions, **options)
    outs = [out]
    for t in range(PROMPT, PROMPT + STEPS):
        parts = [x[:, t : t + 1] for x in (query, key, value)]
        out, cache = step(cache, *parts, cache.next_positions(1), **options)
        outs.append(out)
    return np.concatenate(outs, axis=1), cache


@functools.cache
def quest():
    return stream(QUEST)


def row_of(row):
    """Keys and values of a row as its text has them, and the positions of its single tokens."""
    keep = [t for t in range(PROMPT + STEPS) if row == 0 or not PROMPT - 6 <= t < PROMPT]
    query, key, value = (x[row, keep].astype(np.float64) for x in text())
    return query, key, value, len(keep)


def oracle(row, t, dense=False):
    """Output of the query at position t, all heads, in float64."""
    query, key, value, _ = row_of(row)
    out = np.zeros((N, V))
    pages = [range(j, min(t + 1, j + PAGE)) for j in range(0, t + 1, PAGE)]

    def logit(x, n, s):
        return 4 * np.tanh(x / np.sqrt(H) / 4) - float(SLOPES[n]) * (t - s)

    for kv in range(K):
        scores = np.full(len(pages), -np.inf)
        for n in range(kv * G, kv * G + G):
            for j, page in enumerate(pages):
                k = key[page, kv]
                best = np.maximum(query[t, n] * k.min(0), query[t, n] * k.max(0)).sum()
                scores[j] = max(scores[j], logit(best, n, page[-1]))
        forced = {0, len(pages) - 1, len(pages) - 2}
        rest = [j for j in np.argsort(-scores, kind="stable") if j not in forced]
        kept = sorted(forced | set(rest[: len(pages) if dense else 5 - len(forced)]))
        slots = [s for j in kept for s in pages[j]]
        for n in range(kv * G, kv * G + G):
            x = [logit(query[t, n] @ key[s, kv], n, s) for s in slots]
            terms = np.exp(x)
            out[n] = terms @ value[slots, kv] / (terms.sum() + np.exp(SINKS[n]))
    return out


def test_steps_read_the_best_pages_and_nothing_else():
    out, _ = quest()
    for row in range(B):
        length = row_of(row)[3]
        for i in range(STEPS):
            want = oracle(row, length - STEPS + i)
            np.testing.assert_allclose(out[row, PROMPT + i], want, atol=1e-5)
    # Five pages of ten: it matters which.
    assert np.abs(want - oracle(row, length - 1, dense=True)).max() > 1e-2
    for t in (5, 28):  # a chunk reads all
        np.testing.assert_allclose(out[0, t], oracle(0, t, dense=True), atol=1e-5)


def test_page_statistics_are_those_of_the_stored_keys():
    """Also of pages that a prompt began and single tokens went on with."""
    state = quest()[1].layers[0]
    for row in range(B):
        _, key, _, length = row_of(row)
        np.testing.assert_array_equal(state.kept.key[row, :, :length], key.swapaxes(0, 1))
        for j in range(state.low.shape[2]):
            k = key[j * PAGE : j * PAGE + PAGE]
            np.testing.assert_array_equal(state.low[row, :, j], k.min(0, initial=np.inf))
            np.testing.assert_array_equal(state.high[row, :, j], k.max(0, initial=-np.inf))


def test_bound_is_never_passed(x64):
    draw = np.random.default_rng(1).standard_normal
    query, key = draw((B, N, H)), draw((B, K, 7, PAGE, H))
    bounds = page_bounds(*(jnp.asarray(x) for x in (query, key.min(3), key.max(3))))
    dots = np.einsum("bnh,bnjph->bnjp", query, key.repeat(G, axis=1)).max(-1)
    assert (np.asarray(bounds) >= dots - 1e-12).all()
    low, high = (x.repeat(G, axis=1) for x in (key.min(3), key.max(3)))
    want = np.maximum(query[:, :, None] * low, query[:, :, None] * high).sum(-1)
    np.testing.assert_allclose(bounds, want, rtol=1e-12)


def test_forced_pages_beat_every_score():
    """Scores of no number or without end neither displace the first page nor the newest."""
    scores = np.zeros((1, N, 8), np.float32)
    scores[0, 0] = [-np.inf, np.inf, np.nan, 1, 9, -9, -np.inf, np.inf]
    counts = {"num_kv_heads": K, "num_pages": 4, "num_recent_pages": 2}
    held, newest = np.array([[True] * 7 + [False]]), np.array([6])
    got = jax.jit(functools.partial(best_pages, **counts))(scores, held, newest)
    assert got[0, 0].tolist() == [0, 1, 5, 6]
    assert got[0, 1].tolist() == [0, 1, 5, 6]  # a tie goes to the earlier page


@pytest.mark.parametrize("num_pages", [pytest.param(11, marks=pytest.mark.slow), 12])
def test_room_for_all_pages_is_full(num_pages):
    """11 pages hold the text of the test but not the cache; 12 hold all and are a dense store."""
    description = PagedTopK(LENGTH, PAGE, num_pages, num_dense_layers=0)
    store = description.store(LayerSpec(K, H))
    assert isinstance(store, Pages) == (num_pages == 11)
    if num_pages == 12:
        assert store == Full(LENGTH).store(LayerSpec(K, H))
        return
    got, want = stream(description)[0], stream(Full(LENGTH))[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
def test_widened_values_of_differential_attention():
    description = PagedTopK(LENGTH, PAGE, 11, num_dense_layers=0)
    got, want = (stream(d, differential=True)[0] for d in (description, Full(LENGTH)))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_layers_that_stay_dense():
    windowed = LayerSpec(K, H, window=8)
    description = PagedTopK(LENGTH, PAGE, 5)
    stores = [description.store(LayerSpec(K, H), layer, 4) for layer in range(4)]
    dense = Full(LENGTH).store(LayerSpec(K, H))
    assert [store == dense for store in stores] == [True, True, False, False]
    assert QUEST.store(windowed) == Full(LENGTH).store(windowed)


@pytest.mark.slow
def test_a_row_can_start_again():
    cache = quest()[1].reset_rows(jnp.asarray([False, True]))
    state, old = cache.layers[0], quest()[1].layers[0]
    assert np.isposinf(state.low[1]).all() and np.isneginf(state.high[1]).all()
    np.testing.assert_array_equal(state.low[0], old.low[0])
    assert cache.evicted.tolist() == [0, 0] and cache.limit == LENGTH


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match=r"num_pages: expected an integer of at least 3, got 2"):
        PagedTopK(LENGTH, num_pages=2)
    with pytest.raises(ValueError, match="page_size"):
        PagedTopK(LENGTH, page_size=0)
