"""Streams that share a step draw what they draw alone, whoever comes and goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream import Batch, Session, generate

CACHE = SinkWindow(3, 11)
ROWS, CHUNK = 3, 9
# Prompt, seed and number of tokens: prompts shorter and longer than a chunk and than the cache.
STREAMS = [
    ([5, 77, 200], 1, 23),
    (list(range(31)), 2, 9),
    ([9], 3, 30),
    ([8] * 10, 4, 1),
    ([7, 6], 4, 17),
    ([7, 6], 5, 17),
]


def batch_of(model, description=CACHE, **options):
    return Batch(model, description, rows=ROWS, chunk_size=CHUNK, **options)


def alone(model, prompt, seed, count, cache=CACHE):
    return list(
        generate(model, prompt, cache=cache, seed=seed, max_new_tokens=count, chunk_size=CHUNK)
    )


def collect(batch, until=()):
    """Events by id: of all streams, or until these have finished."""
    found = {}
    for id, event in batch.run():
        found.setdefault(id, []).append(event)
        if until and all(finished(found, i) for i in until):
            break
    return found


def finished(found, id):
    return id in found and found[id][-1].finish_reason is not None


def test_every_stream_is_what_generate_gives(model, traces):
    batch = batch_of(model)
    ids = {batch.admit(p, seed=s, max_new_tokens=n): (p, s, n) for p, s, n in STREAMS[:4]}
    assert batch.active == () and batch.waiting == (1, 2, 3, 4)
    found = {}
    for count, (id, event) in enumerate(batch.run()):
        found.setdefault(id, []).append(event)
        assert len(batch.active) <= ROWS
        if count == 20:  # in the middle, beside streams that are older
            ids |= {batch.admit(p, seed=s, max_new_tokens=n): (p, s, n) for p, s, n in STREAMS[4:]}
    assert sorted(found) == sorted(ids) and batch.active == batch.waiting == ()
    assert sorted(traces) == [(1, CHUNK), (ROWS, 1)]  # six streams, two programs
    for id, (prompt, seed, count) in ids.items():
        want = alone(model, prompt, seed, count)
        assert [e.token for e in found[id]] == [e.token for e in want]
        np.testing.assert_allclose(
            [e.logprob for e in found[id]], [e.logprob for e in want], atol=2e-5
        )
        assert [e.finish_reason for e in found[id]] == [e.finish_reason for e in want]
        for got, wanted in zip(found[id], want, strict=True):
            assert got.statistics == wanted.statistics


def test_neighbours_change_no_bit(model):
    (prompt, seed, count), rest = STREAMS[1], [STREAMS[0], *STREAMS[2:]]
    batch = batch_of(model)
    for p, s, n in rest:
        batch.admit(p, seed=s, max_new_tokens=n)
    for _ in range(7):
        batch.step()
    id = batch.admit(prompt, seed=seed, max_new_tokens=count)
    crowded = collect(batch)[id]
    quiet = batch_of(model)
    assert quiet.admit(prompt, seed=seed, max_new_tokens=count) == 1
    assert collect(quiet)[1] == crowded  # log-probabilities too


def test_a_row_is_a_session_to_fork_and_to_continue(model):
    prompt, seed, count = STREAMS[0]
    want = [e.token for e in alone(model, prompt, seed, 23)]
    batch = batch_of(model)
    id = batch.admit(prompt, seed=seed, max_new_tokens=8, hold=True)
    other = batch.admit([1, 2], seed=9)
    with pytest.raises(ValueError, match="stream 1 has no row yet"):
        batch.session(id)
    first = collect(batch, until=[id])[id]
    assert [e.token for e in first] == want[:8] and id in batch.active
    session = batch.session(id)
    assert session.position == session.cache.time[0] == 2 + 3 + 7
    batch.retire(id)
    assert batch.active == (other,)
    forks = [batch.admit(session=session, max_new_tokens=15) for _ in range(2)]
    again = batch.admit([4], session=session, max_new_tokens=3)
    found = collect(batch, until=(*forks, again))
    for fork in forks:
        assert [e.token for e in found[fork]] == want[8:]
    turn = generate(model, [4], cache=session.fork(), max_new_tokens=3, chunk_size=CHUNK)
    assert [e.token for e in found[again]] == [e.token for e in turn]
    rest = generate(model, [], cache=session, max_new_tokens=15, chunk_size=CHUNK)
    assert [e.token for e in rest] == want[8:]


def test_stops_retirement_and_the_queue(model):
    free = [e.token for e in alone(model, [9], 0, 30)]
    stop = free[12]
    batch = batch_of(model)
    endless = [batch.admit([n]) for n in range(ROWS)]
    stopped = batch.admit([9], stop_tokens=[stop])
    never = batch.admit([3])
    for _ in range(6):
        batch.step()
    assert set(batch.active) == set(endless) and batch.waiting == (stopped, never)
    batch.retire(endless[1])
    batch.retire(never)
    found = collect(batch, until=[stopped])
    assert [e.token for e in found[stopped]] == free[: free.index(stop) + 1]
    assert found[stopped][-1].finish_reason == "stop" and stopped not in batch.active
    assert never not in found and batch.waiting == ()
    with pytest.raises(ValueError, match=f"id: expected one of .* got {stopped}"):
        batch.retire(stopped)


@pytest.mark.slow
def test_a_row_of_a_full_cache_ends_without_the_others(model):
    batch = Batch(model, Full(14), rows=2, chunk_size=CHUNK)
    long, short = batch.admit([1, 2, 3], seed=1), batch.admit([1], seed=2, max_new_tokens=20)
    found = collect(batch)
    # Two learned sink tokens and the prompt, then one token for each free slot, and one more.
    assert [len(found[long]), len(found[short])] == [14 - 5 + 1, 14 - 3 + 1]
    assert {found[id][-1].finish_reason for id in (long, short)} == {"length"}
    with pytest.raises(ValueError, match="Full cache of length 14 holds 0 tokens"):
        batch.admit([1] * 13)


def test_a_stream_without_numbers_ends_alone(model):
    graph, parameters = nnx.split(model)
    broken = nnx.merge(graph, jax.tree.map(jnp.copy, parameters))
    table = broken.embedding.embedding
    table[...] = table[...].at[200].set(jnp.nan)
    batch = batch_of(broken)
    good, bad = batch.admit([1], max_new_tokens=6), batch.admit([3, 200], max_new_tokens=6)
    events = []
    with pytest.raises(FloatingPointError, match=f"logits of stream {bad} at 4 are NaN"):
        while True:
            events += batch.step().items()
    events += batch.run()
    want = alone(broken, [1], 0, 6)
    assert [(id, event.token) for id, event in events] == [(good, event.token) for event in want]


def test_bad_input(model):
    batch = batch_of(model)
    session = Session.start(model, SinkWindow(2, 11))
    for arguments, options, message in (
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1 or None, got 0"),
        (["text"], {}, "prompt: a text needs tokenizer="),
        ([[263]], {}, "prompt: expected ids of 0 to 262, got 263"),
        ([[1]], {"session": session}, "session: expected a cache of SinkWindow"),
        ([[1]], {"session": session, "seed": 3}, "seed: a session has its own"),
        ([[1]], {"stop_strings": ["x"]}, "stop_strings: texts need tokenizer="),
    ):
        with pytest.raises(ValueError, match=message):
            batch.admit(*arguments, **options)
    assert batch.waiting == () and batch.step() == {}
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        Batch(model, CACHE, rows=0)
    for _ in range(ROWS):
        batch.admit([1], max_new_tokens=1, hold=True)
    batch.admit([2], max_new_tokens=1)
    with pytest.raises(ValueError, match="every row is held by a finished stream; retire one"):
        list(batch.run())
