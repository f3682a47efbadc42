"""Prompts longer than the cache: read whole, cut in the middle, or refused."""

import numpy as np
import pytest

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream import Session, generate, prefill

CACHE = SinkWindow(3, 11)
C, LEARNED = 14, [261, 262]
PROMPT = np.random.default_rng(4).integers(0, 257, 40).tolist()


def first(model, prompt, cache=CACHE, **options):
    return next(generate(model, prompt, cache=cache, chunk_size=9, **options))


def test_chunk_reads_all_of_it(model):
    event = first(model, PROMPT)
    assert event.statistics.position == 42 and event.statistics.evicted == 42 - C
    assert event.statistics.dropped == 0
    logits, _ = prefill(model, model.init_cache(CACHE, 1), [[*LEARNED, *PROMPT]], chunk_size=9)
    want = logits[0, event.token] - np.logaddexp.reduce(np.asarray(logits[0], np.float64))
    np.testing.assert_allclose(event.logprob, want, atol=2e-5)


def test_truncate_middle_keeps_both_ends(model):
    """Fourteen slots: learned sink tokens and five ids in front, the last seven behind."""
    session = Session.start(model, CACHE)
    event = first(model, PROMPT, session, overlength="truncate_middle")
    assert event[:3] == first(model, PROMPT[:5] + PROMPT[-7:])[:3]
    assert event.statistics[:2] == (C, 0) and event.statistics.dropped == 42 - C
    turn = list(
        generate(
            model,
            PROMPT[:20],
            cache=session,
            chunk_size=9,
            overlength="truncate_middle",
            max_new_tokens=3,
        )
    )
    # What is pending is the first of its head; the count is that of the stream.
    assert [e.statistics.dropped for e in turn] == [42 - C + 21 - C] * 3
    assert [e.statistics.position for e in turn] == [2 * C, 2 * C + 1, 2 * C + 2]
    short = first(model, PROMPT[:12], overlength="truncate_middle")
    assert short == first(model, PROMPT[:12])  # it fits, so it is left alone


def test_error_names_both_lengths(model):
    with pytest.raises(ValueError, match="at most the 14 tokens .* got 42; overlength='chunk'"):
        generate(model, PROMPT, cache=CACHE, overlength="error")
    session = Session.start(model, CACHE)
    first(model, PROMPT[:12], session, overlength="error")
    with pytest.raises(ValueError, match="at most the 14 tokens .* got 15"):
        generate(model, PROMPT[:14], cache=session, overlength="error")


def test_of_a_full_cache_only_what_is_left_counts(model):
    session = Session.start(model, Full(20))
    first(model, PROMPT[:8], session, overlength="error")
    with pytest.raises(ValueError, match="at most the 10 tokens .* got 11"):
        generate(model, PROMPT[:10], cache=session, overlength="error")
    event = first(model, PROMPT[:10], session, overlength="truncate_middle")
    assert event.statistics.position == 20 and event.statistics.dropped == 1
    with pytest.raises(ValueError, match="at most the 0 tokens"):
        generate(model, PROMPT[:10], cache=session, overlength="truncate_middle")
    session.trim(1 + 4)  # what is pending, and what four slots hold
    assert first(model, PROMPT[:4], session).statistics.position == 20


def test_an_unknown_policy(model):
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="overlength: expected one of chunk, truncate_middle"):
            generate(model, PROMPT, cache=CACHE, overlength="truncate")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
