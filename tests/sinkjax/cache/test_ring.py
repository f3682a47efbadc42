import jax.numpy as jnp
import numpy as np

from sinkjax.cache import ring
from sinkjax.cache.store import Layout

LAYOUT = Layout(3, 5, None)


def test_slots_of_a_long_chunk_are_unique():
    positions = jnp.asarray([[*range(14)]])
    slots = np.asarray(ring.slots(LAYOUT, positions))[0]
    kept = slots < 8
    # the sinks, and the last five
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2, 9, 10, 11, 12, 13])
    assert len(set(slots)) == 14
    np.testing.assert_array_equal(slots[9:], [3 + (p - 3) % 5 for p in range(9, 14)])


def test_padding_and_refused_tokens_are_not_written():
    positions = jnp.asarray([[-1, 4, -1, 5], [-2, ring.LIMIT, 7, -1]])
    slots = np.asarray(ring.slots(LAYOUT, positions))
    np.testing.assert_array_equal(
        slots < 8, [[False, True, False, True], [False, False, True, False]]
    )
    leaf = ring.write(jnp.full((2, 8), -1), jnp.asarray(slots), positions)
    assert sorted(np.asarray(leaf[0])) == [-1] * 6 + [4, 5]
    assert sorted(np.asarray(leaf[1])) == [-1] * 7 + [7]


def test_write_puts_activations_into_cache_leaves():
    new = jnp.arange(2 * 2 * 3 * 2.0).reshape(2, 2, 3, 2)  # [B, T, K, H]
    leaf = ring.write(jnp.zeros((2, 3, 8, 2)), jnp.asarray([[6, 1], [0, 9]]), new)
    np.testing.assert_array_equal(leaf[0, :, 6], new[0, 0])
    np.testing.assert_array_equal(leaf[0, :, 1], new[0, 1])
    np.testing.assert_array_equal(leaf[1, :, 0], new[1, 0])
    assert np.count_nonzero(leaf) == np.count_nonzero(new[0]) + np.count_nonzero(new[1, 0])
