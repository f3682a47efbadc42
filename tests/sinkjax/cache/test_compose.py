"""Caches that differ from layer to layer and from head to head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec, PerHead, PerLayer, SinkWindow
from sinkjax.ops.positions import alibi_bias
from sinkjax.ops.rope import Rope
from sinkjax.ops.slots import Slots

N, K, H = 6, 3, 10
P, W, T = 2, 5, 29
ROPE = Rope(head_dim=H)
# Heads out of order, so that a missing permutation shows.
MIXED = PerHead((((2, 0), Full(T)), ((1,), SinkWindow(P, W))))


@functools.partial(jax.jit, static_argnames=("biased",))
def step(cache, query, key, value, positions, sinks, slots, slopes, biased=False):
    bias = functools.partial(alibi_bias, slopes=slopes) if biased else None
    out, state = caches.attend(
        cache.layer(0), query, key, value, positions, rope=ROPE, sinks=sinks, slots=slots,
        position_bias=bias,
    )  # fmt: skip
    return out, cache.advance([state], positions)


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(3).standard_normal
    q, k, v = draw((1, T, N, H)), draw((1, T, K, H)), draw((1, T, K, H))
    slot_key, slot_value = draw((K, 2, H)), draw((K, 2, H))
    return q, k, v, draw(N), slot_key, slot_value, np.abs(draw(N)) / 9


def test_every_group_attends_as_if_it_were_alone(arrays, oracle):
    q, k, v, sinks, slot_key, slot_value, slopes = arrays
    cache = caches.create(MIXED, [LayerSpec(K, H)], 1)
    assert cache.capacity == T and cache.limit == T
    slots = Slots(jnp.asarray(slot_key, jnp.float32), jnp.asarray(slot_value, jnp.float32))
    outs, start = [], 0
    for size in (9, 1, 9, 1, 9):
        cut = slice(start, start + size)
        positions = np.arange(start, start + size, dtype=np.int32)[None]
        out, cache = step(
            cache, q[:, cut], k[:, cut], v[:, cut], positions, jnp.asarray(sinks, jnp.float32),
            slots, jnp.asarray(slopes, jnp.float32), biased=True,
        )  # fmt: skip
        outs.append(np.asarray(out)[0])
        start += size
    got = np.concatenate(outs)

    def dense(heads, **mask):
        mine = [2 * head + g for head in heads for g in range(2)]
        slot = (slot_key[heads], slot_value[heads], "key_value", "start")
        return mine, oracle.attention(
            q[0][:, mine], k[0][:, heads], v[0][:, heads], sinks=sinks[mine], slots=slot,
            bias=lambda d: -slopes[mine][:, None, None] * np.abs(d), **mask,
        )  # fmt: skip

    for mine, want in (
        dense([2, 0]),
        dense([1], window=W, num_sink_tokens=P, position_cap=P + W - 1),
    ):
        np.testing.assert_allclose(got[:, mine], want, atol=2e-5)


def test_memory_is_that_of_the_groups():
    mixed = caches.create(MIXED, [LayerSpec(K, H)], 2)
    slots = 2 * T + (P + W)
    assert mixed.nbytes == 4 * 2 * (2 * slots * H + T + (P + W) + 1)
    assert [p.shape for p in mixed.positions] == [(2, T), (2, P + W)]


def test_layers_keep_what_they_are_told():
    specs = [LayerSpec(K, H), LayerSpec(K, H, num_heads=N)]
    cache = caches.create(PerLayer((SinkWindow(P, W), MIXED)), specs, 1)
    assert [store.capacity for store in cache.stores] == [P + W, T]
    assert cache.layer(1).store.views(cache.layer(1))[0].spec == LayerSpec(2, H, num_heads=4)
    # The ring of layer 0 and that of a group in layer 1 are one layout.
    assert len(cache.positions) == 2
    positions = jnp.arange(T)[None]
    cache = cache.advance(cache.layers, positions)
    assert cache.time.tolist() == [T]
    fresh = cache.reset_rows(jnp.asarray([True]))
    assert all((np.asarray(p) == -1).all() for p in fresh.positions)
    with pytest.raises(ValueError, match=f"Full cache of length {T} holds {T} tokens"):
        cache.require_room(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerLayer(()), "a description per layer, got none"),
        (lambda: PerHead((((), Full(3)),)), "expected groups of heads"),
        (lambda: PerHead((((0, 1), Full(3)),)).store(LayerSpec(3, H)), "each of the 3 key/value"),
        (lambda: PerHead((((0, 1, 1), Full(3)),)).store(LayerSpec(2, H)), r"once, got \[0, 1, 1\]"),
        (lambda: PerLayer((Full(3),)).store(LayerSpec(2, H), 0, 2), "one per layer, 2, got 1"),
    ],
)
def test_impossible_compositions(make, message):
    with pytest.raises(ValueError, match=message):
        make()
