"""Loss along a text that comes in blocks of any size."""

import numpy as np
import pytest

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream import Session, evaluate, generate, score

TEXT = np.random.default_rng(7).integers(0, 257, 60).astype(np.int32)
CACHE = SinkWindow(3, 11)


def nll(parts):
    return np.concatenate([part.nll for part in parts])


def blocks(*ends):
    return [TEXT[a:b] for a, b in zip((0, *ends), (*ends, TEXT.size), strict=True)]


def test_it_does_not_depend_on_the_blocks(model):
    want = evaluate(
        model, TEXT, policies=["sink_window"], num_sink_tokens=3, window=11, chunk_size=9
    )["sink_window"].nll
    assert want.size == TEXT.size  # learned sink tokens lead
    for text in (blocks(), blocks(1, 1, 2, 8, 9, 40, 59)):
        parts = list(score(model, text, cache=CACHE, chunk_size=9))
        np.testing.assert_array_equal(nll(parts), want)
        assert [p.statistics.position for p in parts] == [9, 18, 27, 36, 45, 54, 61]
        assert [p.statistics.evicted for p in parts] == [0, 4, 13, 22, 31, 40, 47]
        assert parts[0].nll.size == 8  # the second learned sink token is not scored
    bare = nll(score(model, blocks(5), cache=CACHE, chunk_size=9, lead=()))
    assert bare.size == TEXT.size - 1


def test_it_is_dense_attention_until_the_first_eviction(model, dense):
    import jax

    lead = list(model.config.learned_sink_ids)
    tokens = [*lead, *TEXT.tolist()]
    logits = np.asarray(jax.nn.log_softmax(dense(model, tokens), axis=-1), np.float64)
    want = -logits[np.arange(len(tokens) - 1), tokens[1:]][len(lead) - 1 :]
    got = nll(score(model, blocks(3), cache=CACHE, chunk_size=9))
    np.testing.assert_allclose(got[: 14 - 1], want[: 14 - 1], atol=2e-5)
    assert np.abs(got - want)[14:].max() > 1e-3


def test_a_session_goes_on_where_it_stopped(model):
    whole = nll(score(model, blocks(), cache=CACHE, chunk_size=9))
    session = Session.start(model, CACHE)
    first = nll(score(model, [TEXT[:20]], cache=session, chunk_size=9))
    assert (session.position, session.pending) == (21, TEXT[19])
    rest = nll(score(model, [TEXT[20:]], cache=session, chunk_size=9))
    np.testing.assert_allclose(np.concatenate([first, rest]), whole, atol=2e-5)
    # and what follows is what `generate` says of a prompt
    want = generate(model, TEXT.tolist(), cache=CACHE, max_new_tokens=7, chunk_size=9)
    got = generate(model, [], cache=session, max_new_tokens=7, chunk_size=9)
    assert [e.token for e in got] == [e.token for e in want]
    assert session.tail[-9:-7] == tuple(TEXT[-2:].tolist())


def test_bad_input(model):
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        score(model, [TEXT], cache=CACHE, chunk_size=0)
    with pytest.raises(ValueError, match="text: expected at least two tokens, .* got 1"):
        list(score(model, [[], [4], []], cache=CACHE, chunk_size=9, lead=()))
    with pytest.raises(ValueError, match="Full cache of length 7 holds 0 tokens"):
        list(score(model, [TEXT], cache=Full(7), chunk_size=9))
