import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream import Sampler, Session, generate

CACHE = SinkWindow(3, 11)
LEARNED = [261, 262]


def tokens_of(events):
    return [event.token for event in events]


def test_greedy_is_the_argmax_of_the_dense_model(model, dense):
    prompt = [5, 77, 200]
    got = tokens_of(
        generate(
            model,
            prompt,
            cache=Full(40),
            sampler=Sampler(temperature=0),
            max_new_tokens=12,
            chunk_size=9,
        )
    )
    text = [*LEARNED, *prompt]
    for token in got:
        logits = dense(model, text)[-1]
        logits[LEARNED] = -np.inf
        assert np.argmax(logits) == token
        text.append(token)


def test_events(model, dense, tokenizer):
    session = Session.start(model, CACHE, seed=4)
    events = list(
        generate(model, "Zoë", cache=session, tokenizer=tokenizer, max_new_tokens=20, chunk_size=9)
    )
    start = len(LEARNED) + 1 + 4  # learned sink tokens, BOS, four bytes
    statistics = [event.statistics for event in events]
    assert [s.position for s in statistics] == list(range(start, start + 20))
    assert [s.evicted for s in statistics] == [max(0, start + i - 14) for i in range(20)]
    assert {s.cache_slots for s in statistics} == {14}
    assert {s.cache_bytes for s in statistics} == {session.cache.nbytes}
    assert session.cache.time.tolist() == [session.position] == [start + 19]
    assert session.cache.evicted.tolist() == [start + 19 - 14]
    text = bytes(t for t in tokens_of(events) if t < 256).decode(errors="replace")
    assert text.startswith("".join(event.text for event in events))
    # logprobs are the model's own, learned sink tokens included
    stream = [*LEARNED, 256, *"Zoë".encode(), events[0].token]
    logits = dense(model, stream[:-1])[-1]
    want = jax.nn.log_softmax(logits)[stream[-1]]
    np.testing.assert_allclose(events[0].logprob, want, atol=2e-5)


def test_what_leads_the_prompt(model, tokenizer):
    """BOS and learned sink tokens come first, once, and only on an empty cache."""

    def fed(prompt, tokenizer, **options):
        session = Session.start(model, CACHE)
        next(generate(model, prompt, cache=session, tokenizer=tokenizer, chunk_size=9, **options))
        return session.position

    assert fed([1, 2], None) == 2 + 2
    assert fed([1, 2], tokenizer) == 3 + 2
    assert fed([256, 1, 2], tokenizer) == 3 + 2
    assert fed([1, 2], tokenizer, bos=False) == 2 + 2
    assert fed([*LEARNED, 256, 1, 2], tokenizer) == 3 + 2
    assert fed([*LEARNED, 1, 2], None) == 2 + 2
    assert fed("", tokenizer) == 3
    session = Session.start(model, CACHE)
    list(generate(model, "ab", cache=session, tokenizer=tokenizer, max_new_tokens=3, chunk_size=9))
    list(generate(model, "cd", cache=session, tokenizer=tokenizer, max_new_tokens=1, chunk_size=9))
    assert session.position == 3 + 2 + 3 + 2


def test_learned_sink_tokens_are_never_drawn(model):
    graph, parameters = nnx.split(model)
    eager = nnx.merge(graph, jax.tree.map(jnp.copy, parameters))
    kernel = eager.head.kernel
    # all the mass on them
    kernel[...] = (
        jnp.zeros_like(kernel[...]).at[:, jnp.asarray(LEARNED)].set(kernel[...][:, :2] * 50)
    )
    events = list(generate(eager, [1], cache=CACHE, max_new_tokens=200, chunk_size=9))
    assert not set(LEARNED) & set(tokens_of(events))


def test_seeds(model):
    def run(seed, sampler=None):
        return tokens_of(
            generate(
                model, [9], cache=CACHE, seed=seed, sampler=sampler, max_new_tokens=40, chunk_size=9
            )
        )

    assert run(0) == run(0) == run(None)
    assert run(0) != run(1)
    greedy = Sampler(temperature=0)
    assert run(0, greedy) == run(1, greedy)


def test_stop_tokens(model):
    free = tokens_of(generate(model, [9], cache=CACHE, max_new_tokens=40, chunk_size=9))
    stop = free[17]
    session = Session.start(model, CACHE)
    got = tokens_of(generate(model, [9], cache=session, stop_tokens=[stop], chunk_size=9))
    assert got == free[: free.index(stop) + 1]
    # and the stream goes on from there as if it had not stopped
    rest = tokens_of(generate(model, [], cache=session, max_new_tokens=40 - len(got), chunk_size=9))
    assert got + rest == free


def test_why_it_ended(model):
    free = list(generate(model, [9], cache=CACHE, max_new_tokens=10, chunk_size=9))
    assert [e.finish_reason for e in free] == [None] * 9 + ["length"]
    stop = free[4].token
    ended = list(generate(model, [9], cache=CACHE, stop_tokens=[stop], chunk_size=9))
    assert ended[-1].finish_reason == "stop" and {e.finish_reason for e in ended[:-1]} == {None}


def test_stop_strings(model, tokenizer):
    """The text ends before the string, wherever it is cut; the tokens are those of the free run."""
    options = {"tokenizer": tokenizer, "chunk_size": 9}
    free = list(generate(model, "a", cache=CACHE, max_new_tokens=60, **options))
    text = "".join(event.text for event in free)
    stop = text[11:14]
    got = list(generate(model, "a", cache=CACHE, stop_strings=["no such text", stop], **options))
    assert "".join(event.text for event in got) == text[: text.index(stop)]
    assert got[-1].finish_reason == "stop"
    assert tokens_of(got) == tokens_of(free)[: len(got)]
    # What was held back as a possible beginning comes with the last event.
    held = text[:12] + "\0"
    cut = generate(model, "a", cache=CACHE, max_new_tokens=60, stop_strings=[held], **options)
    assert "".join(event.text for event in cut) == text
    with pytest.raises(ValueError, match="stop_strings: texts need tokenizer="):
        generate(model, [1], cache=CACHE, stop_strings=["x"])


def test_a_prompt_that_cuts_a_character_is_completed_by_the_text(model, tokenizer):
    """The text decoder has read the prompt; the answer before it is no part of the next one."""
    cut = "→".encode()
    session = Session.start(model, CACHE)
    stream = generate(model, list(cut[:2]), cache=session, tokenizer=tokenizer, chunk_size=9)
    next(stream)
    assert session.tail == (*LEARNED, 256, *cut[:2], session.pending)
    session.tail = (*session.tail[:-1], cut[0])  # as if it had begun a character
    event = next(generate(model, "b", cache=session, tokenizer=tokenizer, chunk_size=9))
    want = bytes([event.token]).decode(errors="replace") if event.token < 128 else ""
    assert event.text == want


def test_it_is_lazy_and_endless(model):
    stream = generate(model, [9], cache=CACHE, chunk_size=9)
    assert len(list(itertools.islice(stream, 100))) == 100
    assert list(generate(model, [9], cache=CACHE, max_new_tokens=0)) == []


def test_ten_thousand_tokens_compile_once(model, traces):
    cache = SinkWindow(2, 13)  # no other test has compiled for it
    session = Session.start(model, cache)
    bytes_before = session.cache.nbytes
    count = 0
    for event in generate(model, [9, 8, 7], cache=session, max_new_tokens=10_000, chunk_size=7):
        count += 1
        assert event.statistics.cache_bytes == bytes_before
    assert count == 10_000
    assert sorted(traces) == [(1, 1), (1, 7)]
    assert session.cache.nbytes == bytes_before
    # a second turn of another length compiles nothing
    list(generate(model, [1] * 20, cache=session, max_new_tokens=5, chunk_size=7))
    assert sorted(traces) == [(1, 1), (1, 7)]


def test_the_step_donates_its_cache(model):
    session = Session.start(model, CACHE)
    stream = generate(model, [9, 8], cache=session, chunk_size=9)
    next(stream)
    before = session.cache
    kept = session.fork()
    next(stream)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.layers))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept.cache))


def test_a_fork_continues_alike(model):
    session = Session.start(model, CACHE, seed=2)
    list(generate(model, [9, 8], cache=session, max_new_tokens=6, chunk_size=9))
    fork = session.fork()
    a = tokens_of(generate(model, [], cache=session, max_new_tokens=20, chunk_size=9))
    b = tokens_of(generate(model, [], cache=fork, max_new_tokens=20, chunk_size=9))
    assert a == b


def test_a_full_cache_ends_with_an_error(model):
    with pytest.raises(ValueError, match="Full cache of length 8 holds 8 tokens"):
        got = []
        for event in generate(model, [1, 2], cache=Full(8), chunk_size=9):
            got.append(event.token)
    assert len(got) == 5  # two learned sink tokens, two ids, and four of the five fill it


def test_the_clock_ends_with_an_error(model):
    session = Session.start(model, CACHE)
    list(generate(model, [1, 2], cache=session, max_new_tokens=1, chunk_size=9))
    session.position = 2**31 - 3
    session.cache = dataclasses.replace(
        session.cache, time=jnp.full((1,), session.position, jnp.int32)
    )
    got = []
    with pytest.raises(ValueError, match="clock of a stream ends at 2147483647"):
        for event in generate(model, [], cache=session, chunk_size=9):
            got.append(event.statistics.position)
    assert got == [2**31 - 2, 2**31 - 1]


def test_absolute_positions_warn_once_past_the_context(model):
    stream = generate(model, [1], cache=SinkWindow(3, 11, "absolute"), chunk_size=9)
    for _ in range(62):
        next(stream)
    with pytest.warns(UserWarning, match="past the context_length of 64"):
        next(stream)
    for _ in range(10):
        next(stream)


def test_logits_that_are_not_numbers(model):
    graph, parameters = nnx.split(model)
    broken = nnx.merge(graph, jax.tree.map(lambda x: x * jnp.nan, parameters))
    with pytest.raises(FloatingPointError, match="position 3 are NaN"):
        next(generate(broken, [1], cache=CACHE, chunk_size=9))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("text", {}, "prompt: a text needs tokenizer="),
        ([263], {}, "prompt: expected ids of 0 to 262, got 263"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: expected at least 0"),
        ([1], {"chunk_size": 0}, "chunk_size: expected at least 1"),
        ([1] * 50, {"cache": Full(20)}, "Full cache of length 20 holds 0 tokens"),
        ([1], {"cache": SinkWindow(4, 61)}, "context_length=64 slots"),
    ],
)
def test_bad_input_is_refused_at_once(model, prompt, options, message):
    """Before the first event is asked for."""
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **({"cache": CACHE} | options))


def test_a_session_has_a_seed_of_its_own(model):
    with pytest.raises(ValueError, match="seed: a session has its own \\(7\\), got 1"):
        generate(model, [1], cache=Session.start(model, CACHE, seed=7), seed=1)


def test_nothing_to_begin_with():
    from sinkjax.models import Decoder, DecoderConfig

    config = DecoderConfig(
        vocab_size=5,
        model_dim=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        mlp_dim=3,
        context_length=16,
    )
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        generate(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), [], cache=CACHE)


@pytest.mark.parametrize("positions", [{"alibi": "standard"}, {}], ids=["ALiBi", "no positions"])
def test_models_without_rotation_stream(model, dense, positions):
    """Far past the cache, in chunks: the model under its own mask of sinks and a window."""
    config = dataclasses.replace(
        model.config, rope_theta=None, windows=(11,), num_sink_tokens=3, **positions
    )
    other = type(model)(config, rngs=nnx.Rngs(3))
    text = [*LEARNED, *range(40, 61)]
    greedy = Sampler(temperature=0)
    cache = SinkWindow(3, 11, "absolute")
    events = generate(other, text, cache=cache, sampler=greedy, max_new_tokens=9, chunk_size=9)
    for event in events:
        logits = dense(other, text)[-1]
        logits[LEARNED] = -np.inf
        assert np.argmax(logits) == event.token
        text.append(event.token)
    assert event.statistics.evicted == len(text) - 1 - 14
