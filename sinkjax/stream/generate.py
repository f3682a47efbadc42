"""An endless text as an iterator of events."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from sinkjax.cache import Description
from sinkjax.stream.detect import pinned
from sinkjax.stream.events import Event, Events
from sinkjax.stream.prefill import prefill
from sinkjax.stream.prompt import Overlength, fit, learned_sink_ids, to_feed
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.session import Session
from sinkjax.stream.steps import functions, key_data
from sinkjax.stream.structure import place, split
from sinkjax.typing import StreamTokenizer


def generate(
    model: Any,
    prompt: str | Sequence[int],
    *,
    cache: Description | Session,
    sampler: Sampler | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: StreamTokenizer | None = None,
    chunk_size: int = 256,
    bos: bool = True,
    overlength: Overlength = "chunk",
) -> Iterator[Event]:
    """Continue a prompt, token by token, for ever or until told to stop.

    Time per token and memory do not depend on how long the stream has become. On an empty cache
    the prompt is led by the model's learned sink tokens and the tokenizer's BOS, as every training
    row was, unless it brings them itself.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        prompt: text (needs `tokenizer`) or ids; may be empty.
        cache: a description for a new stream, or a `Session` to continue. A session is kept up to
            date: it may be saved, forked or given another prompt between any two events.
        sampler: None samples from the model's own distribution; `Sampler(temperature=0)` is greedy.
        seed: of the sampler, 0 by default; a session brings its own.
        max_new_tokens: None is endless.
        stop_tokens: the first of them that is drawn is the last event.
        stop_strings: the first of them that is complete in the drawn text ends the stream; the text
            of the events ends before it. Text that may be the beginning of one comes later.
        tokenizer: gives text and BOS; without it events have no text.
        chunk_size: tokens per prefill step.
        bos: whether the tokenizer's BOS leads a new stream; False for a model trained without.
        overlength: what becomes of a prompt of more tokens than the cache has slots: "chunk" reads
            all of it, exactly; "truncate_middle" its two ends, as many tokens as there are slots,
            and counts the others in `Statistics.dropped`; "error" refuses it.

    Yields:
        `Event(token, text, logprob, statistics, finish_reason)`; never a learned sink token.

    Raises:
        ValueError: at once for bad arguments; later when a `Full` cache or the int32 clock is at
            its end.
        FloatingPointError: the model's logits are not numbers.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if isinstance(cache, Session):
        if seed is not None:
            raise ValueError(f"seed: a session has its own ({cache.seed}), got {seed}")
        session = cache
        session.check(model)
    else:
        session = Session.start(model, cache, seed=seed or 0)
    position, pending = session.position, session.pending
    tokens = to_feed(model, prompt, tokenizer, bos=bos, position=position, pending=pending)
    tokens, dropped = fit(tokens, session.cache, position, overlength)
    session.cache.require_room(len(tokens), at=position)
    events = Events(
        session,
        tokenizer,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        slots=session.cache.capacity,
        nbytes=session.cache.nbytes,
    )
    if max_new_tokens == 0:
        return iter(())
    return _generate(model, session, tokens, dropped, sampler or Sampler(), events, chunk_size)


def _generate(model, session, tokens, dropped, sampler, events, chunk_size) -> Iterator[Event]:
    structure, arrays = split(model)
    draw, step = functions(structure, sampler, learned_sink_ids(model))
    keys = key_data(session.seed)[None]
    if session.position == 0:
        session.cache = pinned(model, session.cache, [tokens])
    session.cache = place(structure, session.cache)
    while True:
        session.cache.require_room(len(tokens), at=session.position)
        if len(tokens) == 1:
            # Also the first token after a pause, so that it comes from the same program as without.
            drawn, logprob, session.cache = step(
                arrays, session.cache, np.asarray([tokens], np.int32), keys
            )
        else:
            logits, session.cache = prefill(
                model, session.cache, np.asarray([tokens]), chunk_size=chunk_size
            )
            drawn, logprob = draw(logits, session.cache.time, keys)
        session.read(tokens, dropped)
        token, logprob = int(drawn[0]), float(logprob[0])
        if np.isnan(logprob):
            raise FloatingPointError(f"the model's logits at position {session.position} are NaN")
        event = events.drawn(token, logprob)
        yield event
        if event.finish_reason is not None:
            return
        tokens, dropped = [token], 0
