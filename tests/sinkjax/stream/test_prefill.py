import jax
import numpy as np
import pytest

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream import prefill

CACHE = SinkWindow(3, 11)


def ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 257, (rows, length))


def test_it_is_the_dense_model(model, dense):
    tokens = ids(2, 23)
    logits, cache = prefill(model, model.init_cache(Full(23), 2), tokens, chunk_size=9)
    for row in range(2):
        np.testing.assert_allclose(logits[row], dense(model, tokens[row])[-1], atol=2e-5)
    assert cache.time.tolist() == [23, 23]


def test_chunk_size_does_not_matter(model):
    tokens = ids(1, 50)
    results = [
        prefill(model, model.init_cache(CACHE, 1), tokens, chunk_size=size) for size in (9, 64)
    ]
    (a, cache_a), (b, cache_b) = results
    np.testing.assert_allclose(a, b, atol=2e-5)
    for x, y in zip(jax.tree.leaves(cache_a), jax.tree.leaves(cache_b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_every_length_is_one_program(model, traces):
    for length in (1, 4, 9, 10, 31):
        prefill(model, model.init_cache(SinkWindow(2, 11), 1), ids(1, length), chunk_size=9)
    assert traces == [(1, 9)]


def test_rows_of_different_length(model):
    """Each row is what it would be alone; a row of length 0 keeps its cache."""
    tokens, lengths = ids(3, 25), [25, 0, 4]
    logits, cache = prefill(
        model, model.init_cache(CACHE, 3), tokens, lengths=lengths, chunk_size=9
    )
    assert cache.time.tolist() == lengths
    np.testing.assert_array_equal(logits[1], 0)
    for row in (0, 2):
        alone, _ = prefill(
            model, model.init_cache(CACHE, 1), tokens[row : row + 1, : lengths[row]], chunk_size=9
        )
        np.testing.assert_allclose(logits[row], alone[0], atol=2e-5)
    more, cache = prefill(model, cache, tokens[:, :5], chunk_size=9)
    assert cache.time.tolist() == [30, 5, 9]
    fresh, _ = prefill(model, model.init_cache(CACHE, 1), tokens[1:2, :5], chunk_size=9)
    np.testing.assert_allclose(more[1], fresh[0], atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (ids(2, 5), {}, "tokens: expected .* B=1 .* got \\(2, 5\\)"),
        (ids(1, 0), {}, "tokens: expected .* T > 0"),
        (ids(1, 5), {"lengths": [6]}, "lengths: expected 1 numbers of 0 to T=5, got \\[6\\]"),
        (ids(1, 5), {"lengths": [0]}, "at least one token"),
        (ids(1, 5), {"chunk_size": 0}, "chunk_size: expected at least 1"),
        (ids(1, 31), {}, "Full cache of length 30 holds 0 tokens and cannot take 31 more"),
    ],
)
def test_bad_input(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        prefill(model, model.init_cache(Full(30), 1), tokens, **options)
