"""What was undone has never been: the stream goes on as one that never read it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Scored, SinkWindow
from sinkjax.cache.policies import Knorm
from sinkjax.models import Decoder
from sinkjax.stream import Session, generate, prefill
from sinkjax.stream.trim import trim

CACHE = SinkWindow(3, 11)
C = 14
TOKENS = np.random.default_rng(8).integers(0, 257, 40).tolist()


def run(model, session, prompt, count):
    stream = generate(model, prompt, cache=session, max_new_tokens=count, chunk_size=9)
    return [(event.token, event.logprob) for event in stream]


def test_trim_is_never_having_read(model):
    """Two learned sink tokens, three ids, six drawn: all but the first four are undone."""
    session = Session.start(model, CACHE, seed=3)
    run(model, session, TOKENS[:3], 6)
    assert (session.position, session.pending is None) == (10, False)
    session.trim(7)
    assert (session.position, session.pending, session.tail) == (4, None, (261, 262, *TOKENS[:2]))
    fresh = Session.start(model, CACHE, seed=3)
    run(model, fresh, TOKENS[:2], 1)
    fresh.trim(1)  # the pending token alone
    assert fresh.position == 4 and fresh.pending is None
    # Bit for bit, also when the ring goes round.
    assert run(model, session, TOKENS[5:9], 20) == run(model, fresh, TOKENS[5:9], 20)


def test_drawing_again_gives_the_same_token(model):
    """An answer is undone by its tokens and the last of its prompt, which is fed again."""
    session = Session.start(model, CACHE, seed=3)
    first = run(model, session, TOKENS[:5], 4)
    session.trim(5)
    assert session.position == 2 + 4
    again = run(model, session, TOKENS[4:5], 4)
    assert [token for token, _ in again] == [token for token, _ in first]
    np.testing.assert_allclose([x for _, x in again], [x for _, x in first], atol=2e-5)


def test_past_what_the_ring_holds_it_is_refused(model):
    session = Session.start(model, CACHE)
    run(model, session, TOKENS[:12], 1)
    assert session.position == C
    fork = session.fork()
    fork.trim(C + 1)  # the ring is full and has not gone round: everything may go
    assert fork.cache.time.tolist() == [0] and fork.tail == ()
    run(model, session, [], 5)
    assert session.position == C + 5
    before = dataclasses.replace(session)
    # Token 17 looks back at 7 … 16, and 18 tokens later the ring begins at 8.
    with pytest.raises(ValueError, match="no longer holds token 7, which token 17 looks at"):
        session.trim(3)
    assert dataclasses.replace(session) == before
    session.trim(2)
    assert session.position == C + 4
    fresh = Session.start(model, CACHE)
    run(model, fresh, TOKENS[:12], 5)  # one token less, and nothing pending
    fresh.trim(1)
    assert fresh.position == C + 4
    assert run(model, session, TOKENS[20:23], 9) == run(model, fresh, TOKENS[20:23], 9)
    with pytest.raises(ValueError, match="count: expected 0 to the .* tokens of the stream"):
        session.trim(500)
    with pytest.raises(ValueError, match="count: expected 0 to the .* tokens of the stream"):
        session.trim(-1)


def test_once_only_after_the_ring_has_gone_round(model):
    cache = prefill(model, model.init_cache(CACHE, 1), [TOKENS[:30]], chunk_size=9)[1]
    cache = trim(cache, 1)
    with pytest.raises(ValueError, match="no longer holds token 18, which token 28 looks at"):
        trim(cache, 1)
    assert trim(cache, 0).time.tolist() == [29]


@pytest.mark.slow
def test_forget_gates_are_undone_too(model):
    config = dataclasses.replace(model.config, forget_gate=True)
    gated = Decoder(config, rngs=nnx.Rngs(3))

    def read(cache, tokens):
        return prefill(gated, cache, [tokens], chunk_size=9)

    _, cache = read(gated.init_cache(CACHE, 1), TOKENS[:13])
    logits, cache = read(trim(cache, 8), TOKENS[20:27])
    want, fresh = read(gated.init_cache(CACHE, 1), TOKENS[:5] + TOKENS[20:27])
    np.testing.assert_allclose(logits, want, atol=2e-5)
    decays = [c.layers[0].decay[..., : fresh.time[0]] for c in (cache, fresh)]
    np.testing.assert_allclose(*decays, atol=2e-6)
    assert np.abs(np.asarray(decays[0])).max() > 0.5  # they do fade
    assert jax.tree.structure(cache) == jax.tree.structure(fresh)


def test_a_store_that_chose_by_score_is_refused(model):
    session = Session.start(model, Scored(Knorm(), budget=14, num_sink_tokens=3, window=5))
    with pytest.raises(ValueError, match="cannot undo tokens, for what it let go of depended"):
        session.trim(0)
