"""Prompts made smaller after they were read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec, PerHead, Scored
from sinkjax.cache.budgets import Ada, Pyramid
from sinkjax.cache.compress import compress
from sinkjax.cache.policies import H2O
from sinkjax.cache.policies.evidence import last_weights

N, K, H, T = 6, 3, 10, 40
P, W = 2, 3


class Last:
    """Attention of the last two queries."""

    num_queries = 2
    discount = None

    def scores(self, evidence):
        return last_weights(evidence, "Last").mean((2, 3))

    def __eq__(self, other):
        return isinstance(other, Last)

    def __hash__(self):
        return 7


@functools.partial(jax.jit, donate_argnums=())
def step(cache, query, key, value, positions):
    states = []
    for layer in range(2):
        out, state = caches.attend(cache.layer(layer), query, key, value, positions, rope=None)
        states.append(state)
    return out, cache.advance(states, positions)


@pytest.fixture(scope="module")
def prompt():
    draw = np.random.default_rng(8).standard_normal
    q, k, v = draw((1, T + 1, N, H)), draw((1, T + 1, K, H)), draw((1, T + 1, K, H))
    q[..., :2, :] *= 4  # key/value head 0: sharp, few tokens are enough for it
    specs = [LayerSpec(K, H, num_heads=N), LayerSpec(K, H, window=4, num_heads=N)]
    cache = caches.create(Scored(Last(), T, P, W), specs, 1)
    _, cache = step(cache, *(x[:, :T] for x in (q, k, v)), np.arange(T, dtype=np.int32)[None])
    return (q, k, v), cache


def held(state, head):
    return sorted(int(p) for p in np.asarray(state.positions)[0, head] if p >= 0)


def test_alike(prompt):
    _, cache = prompt
    small = compress(cache, 11)
    scores = np.asarray(cache.layers[0].scores)[0]
    at = np.asarray(cache.layers[0].positions)[0]
    for head in range(K):
        order = sorted(zip(scores[head], at[head], strict=True), reverse=True)
        safe = [0, 1, T - 3, T - 2, T - 1]
        best = [int(p) for _, p in order if p not in safe][: 11 - len(safe)]
        assert held(small.layers[0], head) == sorted(safe + best)
    assert small.layers[1] is cache.layers[1]  # a trained window of its own
    assert small.time.tolist() == [T] and small.capacity == 11


def test_shares_give_memory_back(prompt):
    (q, k, v), cache = prompt
    small = compress(cache, 12, shares=Ada(0.2), multiple=2)
    groups = small.description.layers[0].groups
    assert isinstance(small.description.layers[0], PerHead) and len(groups) > 1
    sizes = {head: d.budget for heads, d in groups for head in heads}
    assert sizes[0] == min(sizes.values()) < 12 < max(sizes.values())
    count = sum(len(held(s, i)) for (h, _), s in zip(groups, small.layers[0], strict=True)
                for i in range(len(h)))  # fmt: skip
    assert count == 12 * K
    slots = sum(sizes.values())
    assert count <= slots <= count + 2 * K
    ring = cache.layers[1].key.nbytes * 2 + cache.positions[0].nbytes
    assert small.nbytes == ring + 4 + 4 * (2 * H + 2) * slots + len(groups) * 2 * 4 + 4 * 2 * N * H
    # Decoding goes on, each head among what it has: softmax over exactly those tokens.
    out, after = step(small, *(x[:, T:] for x in (q, k, v)), np.full((1, 1), T, np.int32))
    assert jax.tree.structure(after) == jax.tree.structure(small)
    for index, (heads, _) in enumerate(groups):
        assert all(T in held(after.layers[0][index], i) for i in range(len(heads)))


def test_a_pyramid_cuts_layer_by_layer():
    specs = [LayerSpec(K, H, num_heads=N)] * 3
    cache = caches.create(Scored(H2O(), T, P, W), specs, 1)
    small = compress(cache, Pyramid(16, window=5, beta=2, length=T))
    assert [store.capacity for store in small.stores] == [24, 16, 8]


def test_what_cannot_be_compressed(prompt):
    _, cache = prompt
    with pytest.raises(ValueError, match="budget: expected at least num_sink_tokens . window = 5"):
        compress(cache, 4)
    with pytest.raises(ValueError, match="at most the 40 that layer 0 has, got 41"):
        compress(cache, 41)
    full = caches.create(Full(9), [LayerSpec(K, H)], 1)
    with pytest.raises(ValueError, match="made by Scored, layer 0 is Ring"):
        compress(full, 9)
    assert jnp.asarray(cache.time).tolist() == [T]
