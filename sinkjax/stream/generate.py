"""An endless text as an iterator of events."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.cache import Full, SinkWindow
from sinkjax.stream.prefill import prefill
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.session import Session
from sinkjax.typing import StreamTokenizer

TAIL = 16
"""Drawn tokens that a session keeps for its text decoder; no character is longer."""


class Statistics(NamedTuple):
    """Where a stream stands after a token.

    position: of the token, in tokens from the start of the stream. evicted: earlier tokens that no
    layer can look at any more. cache_slots: C. cache_bytes: of all arrays of the cache, constant.
    """

    position: int
    evicted: int
    cache_slots: int
    cache_bytes: int


class Event(NamedTuple):
    """One token of a stream.

    token: its id. text: what it adds to the text; empty inside a character or without a tokenizer.
    logprob: natural logarithm of its probability under the model, before the sampler.
    """

    token: int
    text: str
    logprob: float
    statistics: Statistics


def generate(
    model: Any,
    prompt: str | Sequence[int],
    *,
    cache: SinkWindow | Full | Session,
    sampler: Sampler | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
    tokenizer: StreamTokenizer | None = None,
    chunk_size: int = 256,
    bos: bool = True,
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
        tokenizer: gives text and BOS; without it events have no text.
        chunk_size: tokens per prefill step.
        bos: whether the tokenizer's BOS leads a new stream; False for a model trained without.

    Yields:
        `Event(token, text, logprob, statistics)`; never a learned sink token.

    Raises:
        ValueError: at once for bad arguments; later when a `Full` cache or the int32 clock is at
            its end.
        FloatingPointError: the model's logits are not numbers.
    """
    if isinstance(prompt, str) and tokenizer is None and prompt:
        raise ValueError("prompt: a text needs tokenizer=, got none; or give a sequence of ids")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0 or None, got {max_new_tokens}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if isinstance(cache, Session):
        if seed is not None:
            raise ValueError(f"seed: a session has its own ({cache.seed}), got {seed}")
        session = cache
        session.check(model)
    else:
        session = Session.start(model, cache, seed=seed or 0)
    learned = _learned_sink_ids(model)
    tokens = _lead(session, prompt, tokenizer, learned, bos)
    size = _vocab_size(model)
    wrong = [] if size is None else [token for token in tokens if not 0 <= token < size]
    if size is not None and wrong:
        raise ValueError(f"prompt: expected ids of 0 to {size - 1}, got {wrong[0]}")
    session.cache.require_room(len(tokens), at=session.position)
    return _events(
        model,
        session,
        tokens,
        sampler or Sampler(),
        learned,
        max_new_tokens,
        frozenset(stop_tokens),
        tokenizer,
        chunk_size,
    )


def _events(
    model, session, tokens, sampler, learned, max_new_tokens, stop_tokens, tokenizer, chunk_size
) -> Iterator[Event]:
    if max_new_tokens == 0:
        return
    graph, parameters = nnx.split(model)
    pick, step = _functions(graph, sampler, learned)
    key = jax.random.key(session.seed)
    slots, size = session.cache.capacity, session.cache.nbytes
    decoder = None if tokenizer is None else tokenizer.stream_decoder()
    if decoder is not None:
        for token in session.tail:
            decoder.push(token)
    count = 0
    while True:
        session.cache.require_room(len(tokens), at=session.position)
        if len(tokens) == 1:
            # Also the first token after a pause, so that it comes from the same program as without.
            drawn, logprob, session.cache = step(
                parameters, session.cache, np.asarray([tokens], np.int32), key
            )
        else:
            logits, session.cache = prefill(
                model, session.cache, np.asarray([tokens]), chunk_size=chunk_size
            )
            drawn, logprob = pick(logits, session.cache.time, key)
        session.position += len(tokens)
        token, logprob = int(drawn[0]), float(logprob[0])
        if np.isnan(logprob):
            raise FloatingPointError(f"the model's logits at position {session.position} are NaN")
        session.pending = token
        session.tail = (*session.tail, token)[-TAIL:]
        count += 1
        last = count == max_new_tokens or token in stop_tokens
        yield Event(
            token,
            "" if decoder is None else decoder.push(token),
            logprob,
            Statistics(session.position, max(session.position - slots, 0), slots, size),
        )
        if last:
            return
        tokens = [token]


def _lead(session, prompt, tokenizer, learned, bos) -> list[int]:
    """The ids to feed: what is pending, or at the start learned sink tokens and BOS; the prompt."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt
    tokens = [int(i) for i in ids] if len(ids) else []
    if session.pending is not None:
        return [session.pending, *tokens]
    if session.position == 0:
        first = [tokenizer.bos_id] if bos and tokenizer is not None else []
        lead = [*learned, *first]
        if tokens[: len(lead)] != lead:
            begins = first != [] and tokens[:1] == first
            tokens = [*lead, *tokens[1:]] if begins else [*lead, *tokens]
    if not tokens:
        raise ValueError("prompt: expected at least one token (no tokenizer gives a BOS), got none")
    return tokens


def _learned_sink_ids(model: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(model, "config", None), "learned_sink_ids", ()))


def _vocab_size(model: Any) -> int | None:
    return getattr(getattr(model, "config", None), "vocab_size", None)


@functools.lru_cache(maxsize=16)
def _functions(
    graph: nnx.GraphDef, sampler: Sampler, forbidden: tuple[int, ...]
) -> tuple[Callable, Callable]:
    """Draw from given logits; feed one token and draw. Kept per model structure and sampler."""

    def draw(logits, time, key):
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, time)
        token = jax.vmap(lambda k, x: sampler(k, x, forbidden))(keys, logits)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def step(parameters, cache, tokens, key):
        output = nnx.merge(graph, parameters)(tokens, cache=cache)
        token, logprob = draw(output.logits[:, -1], output.cache.time, key)
        return token, logprob, output.cache

    return jax.jit(draw), step
