"""A cache whose chunks attend sparsely: the rest of attention is that of `Full`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import cache as caches
from sinkjax.cache import Full, LayerSpec
from sinkjax.cache.sparse_prefill import SparseChunks, SparsePrefill
from sinkjax.ops import Rope, alibi_bias, alibi_slopes, rotate, sparse

B, N, K, H = 2, 6, 2, 10
LENGTH, TEXT, BLOCK = 45, 39, 4
ROPE, SLOPES = Rope(head_dim=H), alibi_slopes(N)
SINKS = np.linspace(-1.0, 1.0, N).astype(np.float32)


@functools.cache
def text():
    draw = np.random.default_rng(0).standard_normal
    parts = [draw((B, TEXT, heads, H)).astype(np.float32) * 1.5 for heads in (N, K, K)]
    return *parts, -np.abs(draw((B, TEXT, N))).astype(np.float32) / 9


@functools.partial(jax.jit, static_argnames=("biased", "differential"))
def step(cache, query, key, value, log_forget, positions, biased, differential):
    bias = (lambda d: alibi_bias(d, SLOPES)) if biased else None
    out, state = caches.attend(
        cache.layer(0), query, key, value, positions, rope=ROPE, position_bias=bias,
        log_forget=log_forget if biased else None, sinks=jnp.asarray(SINKS),
        differential=differential,
    )  # fmt: skip
    return out, cache.advance([state], positions)


def stream(description, sizes, biased=False, differential=False):
    """The text in chunks of these sizes; the last of row 1 is short by two tokens."""
    spec = LayerSpec(K, H, num_forget_heads=N if biased else 0)
    cache, outs, start = caches.create(description, [spec], B), [], 0
    for i, size in enumerate(sizes):
        positions = np.asarray(cache.next_positions(size)).copy()
        if i == len(sizes) - 1:
            positions[1, -2:] = -1
        part = [x[:, start : start + size] for x in text()]
        out, cache = step(cache, *part, positions, biased, differential)
        outs.append(np.asarray(out))
        start += size
    return np.concatenate(outs, axis=1), cache


@pytest.mark.slow
def test_all_blocks_are_full():
    """With sink logits, a bias of distance and forget gates, and single tokens between chunks."""
    everything = SparsePrefill(LENGTH, sparse.BlockSparse(99, BLOCK))
    sizes = (19, 1, 19)
    got, cache = stream(everything, sizes, biased=True)
    want, full = stream(Full(LENGTH), sizes, biased=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    kept = cache.layers[0].kept
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), kept, full.layers[0])
    np.testing.assert_array_equal(cache.positions[0], full.positions[0])
    assert cache.layers[0].truncated.tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [(19, 19), pytest.param((7, 7, 24), marks=pytest.mark.slow)])
def test_a_shape_is_a_sink_window_however_the_prompt_is_cut(oracle, sizes):
    got, cache = stream(SparsePrefill(LENGTH, sparse.AShape(3, 11, BLOCK)), sizes)
    for row in range(B):
        length = 38 - 2 * row
        want = oracle.attention(
            *(x[row, :length] for x in text()[:3]), window=11, num_sink_tokens=3, sinks=SINKS
        )
        np.testing.assert_allclose(got[row, :length], want, atol=1e-5)
        assert (got[row, length:] == 0).all()
    assert cache.layers[0].truncated.tolist() == [0, 0]


@pytest.mark.slow
def test_a_chunk_chooses_from_all_keys_so_far():
    """By its rotated queries; what did not fit the budget is counted over chunks and heads."""
    pattern = sparse.XAttention(threshold=0.95, stride=2, num_blocks=3, block_size=BLOCK)
    out, cache = stream(SparsePrefill(LENGTH, pattern), (19, 19))
    query, key, value, _ = (jnp.asarray(x[:, :38]) for x in text())
    positions = np.broadcast_to(np.arange(38), (B, 38)).copy()
    positions[1, -2:] = -1
    lost = 0

    @jax.jit
    def expected(query, key, value, now):
        query, key = (rotate(x, jnp.maximum(p, 0), ROPE) for x, p in ((query, now), (key, before)))
        key, value = (x.swapaxes(1, 2) for x in (key, value))
        where = {
            "query_positions": now,
            "key_positions": jnp.where(before <= now.max(1)[:, None], before, -1),
        }
        chosen = sparse.select(pattern, query, key, **where)
        return sparse.sparse_attention(
            query, key, value, chosen, sinks=jnp.asarray(SINKS), **where
        ), chosen.truncated.sum(1)

    for begin in (0, 19):
        now = jnp.asarray(positions[:, begin : begin + 19], jnp.int32)
        before = jnp.asarray(positions, jnp.int32)
        want, more = expected(query[:, begin : begin + 19], key, value, now)
        np.testing.assert_allclose(out[:, begin : begin + 19], want, atol=1e-5)
        lost = lost + more
    assert cache.layers[0].truncated.tolist() == lost.tolist() and min(lost.tolist()) > 0


@pytest.mark.slow
def test_heads_with_patterns_of_their_own():
    """A head group sees what a cache of that pattern alone would give its heads."""
    patterns = [sparse.AShape(3, 11, BLOCK), sparse.BlockSparse(4, BLOCK)]
    groups = tuple(((kv,), SparsePrefill(LENGTH, p)) for kv, p in enumerate(patterns))
    both, _ = stream(caches.PerHead(groups), (19, 19))
    for kv, pattern in enumerate(patterns):
        alone, _ = stream(SparsePrefill(LENGTH, pattern), (19, 19))
        mine = slice(kv * N // K, (kv + 1) * N // K)
        np.testing.assert_allclose(both[:, :, mine], alone[:, :, mine], atol=1e-6)


@pytest.mark.slow
def test_widened_values_of_differential_attention():
    everything = SparsePrefill(LENGTH, sparse.BlockSparse(99, BLOCK))
    got, want = (stream(d, (19, 19), differential=True)[0] for d in (everything, Full(LENGTH)))
    assert got.shape[-1] == 2 * H
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_layers_with_a_window_keep_it():
    description = SparsePrefill(LENGTH, sparse.AShape())
    spec = LayerSpec(K, H, window=8, num_sink_tokens=1)
    assert description.store(spec) == Full(LENGTH).store(spec)
    assert isinstance(description.store(LayerSpec(K, H)), SparseChunks)


def test_an_impossible_length_is_refused():
    with pytest.raises(ValueError, match=r"SparsePrefill\.length"):
        SparsePrefill(0, sparse.AShape())
