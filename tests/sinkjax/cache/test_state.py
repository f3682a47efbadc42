import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Cache, Full, LayerSpec, LayerState, SinkWindow
from sinkjax.stream.session import Session

LAYERS = [
    LayerSpec(2, 6),
    LayerSpec(2, 6, window=5),
    LayerSpec(2, 6),
    LayerSpec(3, 4, window=4, num_sink_tokens=1),
    LayerSpec(2, 6, window=100),
]


def test_shapes_and_groups():
    cache = caches.create(SinkWindow(3, 11), LAYERS, 2, dtype=jnp.bfloat16)
    assert [leaf.key.shape for leaf in cache.layers] == [
        (2, 2, 14, 6),
        (2, 2, 5, 6),
        (2, 2, 14, 6),
        (2, 3, 5, 4),
        (2, 2, 14, 6),
    ]
    # A ring of five and one sink token with a ring of four have as many slots but another layout.
    assert [p.shape for p in cache.positions] == [(2, 14), (2, 5), (2, 5)]
    assert all((np.asarray(p) == -1).all() for p in cache.positions)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}
    slots = 3 * 2 * 14 * 6 + 2 * 5 * 6 + 3 * 5 * 4
    assert cache.nbytes == 2 * 2 * 2 * slots + 4 * 2 * (14 + 5 + 5) + 4 * 2


def test_a_cache_is_a_pytree_with_static_descriptions():
    cache = caches.create(SinkWindow(3, 11), LAYERS, 2)
    leaves, treedef = jax.tree.flatten(cache)
    assert len(leaves) == 2 * 5 + 3 + 1
    same = jax.tree.unflatten(treedef, leaves)
    assert isinstance(same, Cache) and same.description == cache.description
    assert hash(treedef) == hash(jax.tree.structure(caches.create(SinkWindow(3, 11), LAYERS, 2)))
    other = caches.create(SinkWindow(3, 11, "absolute"), LAYERS, 2)
    assert jax.tree.structure(other) != treedef


def test_clock_and_eviction():
    cache = caches.create(SinkWindow(3, 5), [LayerSpec(1, 2)], 2)
    states = cache.layers
    positions = jnp.asarray([[0, 1, 2, -1], [-1, -1, 0, -1]])
    cache = cache.advance(states, positions)
    assert cache.time.tolist() == [3, 1]
    np.testing.assert_array_equal(cache.next_positions(2), [[3, 4], [1, 2]])
    assert cache.evicted.tolist() == [0, 0]
    cache = cache.advance(states, jnp.arange(3, 13)[None] + jnp.asarray([[0], [-2]]))
    assert cache.time.tolist() == [13, 11]
    assert cache.evicted.tolist() == [5, 3]
    np.testing.assert_array_equal(cache.positions[0][1], [0, 1, 2, 8, 9, 10, 6, 7])


def test_reset_rows_empties_one_row_only():
    cache = caches.create(SinkWindow(1, 2), [LayerSpec(1, 2)], 3)
    full = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), cache)
    after = full.reset_rows(jnp.asarray([False, True, False]))
    for row, want in ((0, full), (1, cache), (2, full)):
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a[row], b[row])


def test_context_length():
    with pytest.raises(ValueError, match="context_length=16 slots.* = 17"):
        caches.create(SinkWindow(4, 13), [LayerSpec(1, 2)], 1, context_length=16)
    caches.create(SinkWindow(4, 12), [LayerSpec(1, 2)], 1, context_length=16)
    with pytest.warns(UserWarning, match="17 slots at absolute positions .* 16"):
        caches.create(SinkWindow(4, 13, "absolute"), [LayerSpec(1, 2)], 1, context_length=16)
    with pytest.warns(UserWarning, match="17 slots"):
        caches.create(Full(17), [LayerSpec(1, 2)], 1, context_length=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SinkWindow(), [], 1), "layers: expected at least one"),
        ((SinkWindow(), [LayerSpec(1, 2)], 0), "batch_size: expected at least 1, got 0"),
        (((4, 1020), [LayerSpec(1, 2)], 1), "description: expected SinkWindow or Full"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises((ValueError, TypeError) if "description" in message else ValueError) as info:
        caches.create(*arguments)
    if isinstance(info.value, ValueError):
        assert message.split(":")[0] in str(info.value)


def test_host_guards():
    cache = caches.create(Full(9), [LayerSpec(1, 2)], 2)
    cache = dataclasses.replace(cache, time=jnp.asarray([7, 2], jnp.int32))
    cache.require_room(2)
    with pytest.raises(ValueError, match="holds 7 tokens and cannot take 3 more"):
        cache.require_room(3)
    stream = caches.create(SinkWindow(1, 2), [LayerSpec(1, 2)], 1)
    stream = dataclasses.replace(stream, time=jnp.asarray([2**31 - 2], jnp.int32))
    stream.require_room(1)
    with pytest.raises(ValueError, match="clock .* 2147483647"):
        stream.require_room(2)


def test_a_layer_with_a_forget_gate_keeps_its_decay(tmp_path):
    specs = [LayerSpec(2, 6), LayerSpec(2, 6, window=5, num_forget_heads=4)]
    cache = caches.create(SinkWindow(3, 11), specs, 1, dtype=jnp.bfloat16)
    assert cache.layers[0].decay is None
    decay = cache.layers[1].decay
    assert (decay.shape, decay.dtype) == ((1, 4, 5), jnp.float32)
    plain = caches.create(SinkWindow(3, 11), [LayerSpec(2, 6), LayerSpec(2, 6, window=5)], 1)
    assert len(jax.tree.leaves(cache)) == len(jax.tree.leaves(plain)) + 1
    assert cache.nbytes == plain.nbytes - 2 * 2 * 2 * 6 * (14 + 5) + 4 * 4 * 5

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(cache, x, gates):
        positions, states = cache.next_positions(3), []
        for layer, gate in enumerate((None, gates)):
            _, state = caches.attend(
                cache.layer(layer), x, x[:, :, :2], x[:, :, 2:], positions, rope=None,
                log_forget=gate,
            )  # fmt: skip
            states.append(state)
        return cache.advance(states, positions)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4, 6)), jnp.float32)
    gates = -jnp.arange(12.0).reshape(1, 3, 4)
    after = step(cache, x, gates)
    assert decay.is_deleted()
    np.testing.assert_array_equal(after.layers[1].decay[0, 1], [-14, -9, 0, -15, -15])
    Session(after, position=3).save(tmp_path / "session.npz")
    restored = Session.load(tmp_path / "session.npz").cache
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(restored) == jax.tree.structure(after)
    empty = restored.reset_rows(jnp.asarray([True]))
    np.testing.assert_array_equal(empty.layers[1].decay, 0)


def test_advance_wants_every_layer():
    cache = caches.create(SinkWindow(1, 2), [LayerSpec(1, 2)] * 2, 1)
    state = LayerState(cache.layers[0].key, cache.layers[0].value)
    with pytest.raises(ValueError, match="expected 2 states, got 1"):
        cache.advance([state], jnp.zeros((1, 1), jnp.int32))
