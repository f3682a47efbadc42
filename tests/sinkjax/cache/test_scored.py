"""Eviction by score, against a plain loop in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import LayerSpec, SinkWindow
from sinkjax.cache.budgets import Pyramid
from sinkjax.cache.policies import StreamingLLM
from sinkjax.cache.policies.evidence import last_weights, required_mass
from sinkjax.cache.scored import Scored
from sinkjax.ops.rope import Rope

N, K, H = 6, 2, 10
P, W, C, T = 2, 3, 9, 31
ROPE = Rope(head_dim=H)


@dataclasses.dataclass(frozen=True)
class Mass:
    """Faded attention mass: what H2O and its kind ask for."""

    discount: float = 0.9
    num_queries = 0

    def scores(self, evidence):
        return required_mass(evidence, "Mass")


@dataclasses.dataclass(frozen=True)
class Last:
    """Attention of the last three queries."""

    num_queries = 3
    discount = None

    def scores(self, evidence):
        return last_weights(evidence, "Last").mean((2, 3))


@functools.partial(jax.jit, static_argnames=("rope",))
def step(cache, query, key, value, positions, rope=ROPE):
    out, state = caches.attend(cache.layer(0), query, key, value, positions, rope=rope)
    return out, cache.advance([state], positions)


@pytest.fixture(scope="module")
def text():
    draw = np.random.default_rng(5).standard_normal
    return draw((2, T, N, H)) * 1.5, draw((2, T, K, H)), draw((2, T, K, H))


def make(policy, rows=2, capacity=C):
    return caches.create(Scored(policy, capacity, P, W), [LayerSpec(K, H, num_heads=N)], rows)


def feed(cache, text, sizes, rows=slice(None)):
    outs, start = [], 0
    for size in sizes:
        cut = slice(start, start + size)
        at = np.arange(start, start + size, dtype=np.int32)
        at = np.broadcast_to(at, (text[0][rows].shape[0], size))
        out, cache = step(cache, *(x[rows, cut] for x in text), at)
        outs.append(np.asarray(out))
        start += size
    return np.concatenate(outs, axis=1), cache


def simulate(text, row, sizes, oracle, score):
    """Outputs, and the positions each head holds at the end: lists, loops, float64."""
    q, k, v = (x[row] for x in text)
    t_all = np.arange(T)
    q, k = oracle.rotate(q, t_all), oracle.rotate(k, t_all)
    held = [[] for _ in range(K)]
    mass = np.zeros((K, T))
    outs, start = np.zeros((T, N, H)), 0
    asked: list[int] = []
    for size in sizes:
        new = list(range(start, start + size))
        if size == 1:  # the place of the new token is found before it attends
            for h in range(K):
                if len(held[h]) == C:
                    held[h] = evict(
                        held[h], score(h, held[h], mass, asked, q, k), C - 1, start, W - 1
                    )
        for h in range(K):
            held[h] = held[h] + new
        for t in new:
            for h in range(K):
                for g in range(N // K):
                    n = h * (N // K) + g
                    see = [i for i in held[h] if i <= t]
                    w = np.exp(k[see, h] @ q[t, n] * H**-0.5)
                    w /= w.sum()
                    outs[t, n] = w @ v[see, h]
        for t in new:
            mass *= 0.9
            for h in range(K):
                see = [i for i in held[h] if i <= t]
                for g in range(N // K):
                    w = np.exp(k[see, h] @ q[t, h * (N // K) + g] * H**-0.5)
                    mass[h, see] += w / w.sum() / (N // K)
        asked += new
        if size > 1:
            for h in range(K):
                scores = score(h, held[h], mass, asked, q, k)
                held[h] = evict(held[h], scores, C, start + size, W)
        start += size
    return outs, [sorted(x) for x in held]


def evict(held, scores, size, time, window):
    safe = [i for i in held if i < P or i >= time - window]
    rest = sorted((s, i) for s, i in zip(scores, held, strict=True) if i not in safe)
    return (
        sorted(safe + [i for _, i in rest[len(rest) - (size - len(safe)) :]])
        if (len(held) > size)
        else held
    )


def by_mass(h, held, mass, asked, q, k):
    return [mass[h, i] for i in held]


def by_last(h, held, mass, asked, q, k):
    found = np.zeros(len(held))
    for t in asked[-3:]:
        for g in range(N // K):
            w = np.array(
                [np.exp(k[i, h] @ q[t, h * (N // K) + g] * H**-0.5) * (i <= t) for i in held]
            )
            found += w / w.sum()
    return list(found)


@pytest.mark.parametrize(
    ("policy", "score"), [(Mass(), by_mass), (Last(), by_last)], ids=["mass", "last queries"]
)
def test_equals_a_plain_loop(text, oracle, policy, score):
    sizes = (17, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    got, cache = feed(make(policy), text, sizes)
    for row in range(2):
        want, held = simulate(text, row, sizes, oracle, score)
        np.testing.assert_allclose(got[row], want, atol=3e-5)
        found = np.sort(np.asarray(cache.layers[0].positions)[row], axis=-1)
        np.testing.assert_array_equal(found, held)


def test_the_policy_of_positions_is_sink_window(text):
    """One token at a time, in every head, for ever: the closed form that needs no scores."""
    got, cache = feed(make(StreamingLLM()), text, (1,) * T)
    ring = caches.create(SinkWindow(P, C - P, "absolute"), [LayerSpec(K, H)], 2)
    want, ring = feed(ring, text, (1,) * T)
    np.testing.assert_allclose(got, want, atol=1e-5)
    held = np.sort(np.asarray(cache.layers[0].positions), axis=-1)
    np.testing.assert_array_equal(held[0, 0], np.sort(np.asarray(ring.positions[0])[0]))
    assert cache.evicted.tolist() == [T - C] * 2
    assert jax.tree.structure(cache) == jax.tree.structure(make(StreamingLLM()))


def test_scoring_every_few_steps(text):
    """Between two scorings the old scores hold; a row that is due takes the others with it."""
    description = Scored(Mass(), C, P, W, every=3)
    cache = caches.create(description, [LayerSpec(K, H, num_heads=N)], 1)
    _, cache = feed(cache, text, (17,), rows=slice(0, 1))
    before = np.asarray(cache.layers[0].scores)
    for t in (17, 18):  # 18 and 19 tokens taken: due at 18 only
        _, cache = feed_at(cache, text, t)
        scores, mass = (np.asarray(x) for x in (cache.layers[0].scores, cache.layers[0].mass))
        assert np.array_equal(scores, mass) == (t == 17)
        assert not np.array_equal(scores, before)


def test_cache_relative_closes_the_gaps(text, oracle):
    """What is left of the text counts as if it had been all there was."""
    description = Scored(Mass(), C, P, W, "cache_relative")
    cache = caches.create(description, [LayerSpec(K, H, num_heads=N)], 1, context_length=C)
    q, k, v = text
    _, cache = feed(cache, text, (17, 1, 1, 1), rows=slice(0, 1))
    before = np.asarray(cache.layers[0].positions)[0]
    out, after = feed_at(cache, text, 20)
    for head in range(K):
        gone = set(before[head]) - set(np.asarray(after.layers[0].positions)[0, head])
        assert len(gone) == 1
        left = sorted(int(p) for p in before[head] if p not in gone) + [20]
        mine = list(range(head * (N // K), (head + 1) * (N // K)))
        alone = oracle.attention(
            q[0, left][:, mine],
            k[0, left][:, [head]],
            v[0, left][:, [head]],
        )
        np.testing.assert_allclose(out[0, 0, mine], alone[-1], atol=2e-5)
    with pytest.raises(ValueError, match=f"needs at most context_length={C - 1} slots"):
        caches.create(description, [LayerSpec(K, H, num_heads=N)], 1, context_length=C - 1)


def feed_at(cache, text, t):
    out, cache = step(cache, *(x[:1, t : t + 1] for x in text), np.full((1, 1), t, np.int32))
    return np.asarray(out), cache


def test_rows_of_different_age_and_padding(text):
    """A row that waits is not touched, and a row that is emptied starts anew."""
    alone, single = feed(make(Mass(), 1), text, (17, 1), rows=slice(0, 1))
    cache = make(Mass())
    q, k, v = text
    at = np.stack([np.arange(17), np.where(np.arange(17) < 5, np.arange(17), -1)]).astype(np.int32)
    out, cache = step(cache, q[:, :17], k[:, :17], v[:, :17], at)
    np.testing.assert_allclose(out[0], alone[0, :17], atol=1e-5)
    assert cache.time.tolist() == [17, 5]
    np.testing.assert_array_equal(
        np.sort(np.asarray(cache.layers[0].positions)[1, 1]), [-1] * 4 + [0, 1, 2, 3, 4]
    )
    before = jax.tree.map(lambda leaf: np.asarray(leaf)[1], cache.layers[0])
    at = np.asarray([[17], [-1]], np.int32)
    out, cache = step(cache, q[:, 17:18], k[:, 17:18], v[:, 17:18], at)
    np.testing.assert_allclose(out[0], alone[0, 17:18], atol=1e-5)
    assert not np.asarray(out[1]).any()
    jax.tree.map(
        np.testing.assert_array_equal,
        before,
        jax.tree.map(lambda leaf: np.asarray(leaf)[1], cache.layers[0]),
    )
    fresh = cache.reset_rows(jnp.asarray([False, True]))
    assert (np.asarray(fresh.layers[0].positions)[1] == -1).all() and fresh.time.tolist() == [18, 0]
    assert (np.asarray(fresh.layers[0].positions)[0] >= 0).any()


def test_a_layer_with_a_window_keeps_it():
    spec = LayerSpec(K, H, window=4, num_sink_tokens=1, num_heads=N)
    store = Scored(Mass(), C, P, W).store(spec)
    assert (store.capacity, store.window, store.num_sink_tokens) == (5, 4, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Scored(Mass(), 4, P, W),
            "Scored.budget: expected an integer of at least 5, got 4",
        ),
        (
            lambda: Scored(Mass(), Pyramid(9, window=1, beta=9), P, W).store(LayerSpec(K, H), 1, 2),
            "Scored.budget: expected at least .* = 5 tokens, layer 1 gets 1 of",
        ),
        (lambda: Scored(Mass(), 9, P, 0), "Scored.window: expected an integer of at least 1"),
        (
            lambda: Scored(Mass(), 9, P, 3, every=4),
            "every: expected at most the window of 3, got 4",
        ),
        (lambda: Scored(Mass()).store(LayerSpec(K, H, num_forget_heads=N)), "without forget gates"),
        (
            lambda: caches.create(Scored(Last()), [LayerSpec(K, H)], 1),
            "num_heads: expected a number",
        ),
    ],
)
def test_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
