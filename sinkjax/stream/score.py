"""Loss along a text of any length, on a cache of constant size."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sinkjax.cache import Description, keep_layout
from sinkjax.ops.losses import token_nll
from sinkjax.stream.detect import pinned
from sinkjax.stream.events import Statistics
from sinkjax.stream.prompt import learned_sink_ids
from sinkjax.stream.session import Session
from sinkjax.stream.structure import Structure, place, split


class Scores(NamedTuple):
    """What a stretch of a text cost.

    nll: negative log-likelihood of each of its tokens, in nats. statistics: where the stream stands
    after it.
    """

    nll: Float[np.ndarray, " n"]
    statistics: Statistics


def score(
    model: Any,
    text: Iterable[ArrayLike | Sequence[int]],
    *,
    cache: Description | Session,
    lead: Sequence[int] | None = None,
    chunk_size: int = 256,
) -> Iterator[Scores]:
    """Read a text that comes in blocks, and give the loss of its tokens as it goes.

    Each token is predicted from whatever the cache holds of all before it. Neither memory nor time
    per token depend on the length of the text, and the losses not on how it is cut into blocks.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        text: blocks of ids, one after the other.
        cache: a description for a new stream, or a `Session` to go on with. A session is kept up to
            date: `generate` may continue the text from it.
        lead: ids put before a new stream (a model trained with BOS needs it there); None: the
            model's learned sink tokens. They are not scored.
        chunk_size: tokens per step; sink tokens that are to be found are looked for in the first.

    Yields:
        `Scores` of up to `chunk_size` tokens. The first token of a new stream is predicted only
        when there is a `lead`.

    Raises:
        ValueError: at once for bad arguments; later when the text is too short, or a `Full` cache
            or the int32 clock at its end.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if isinstance(cache, Session):
        session = cache
        session.check(model)
    else:
        session = Session.start(model, cache)
    if session.pending is not None:
        first = [session.pending]
    elif session.position > 0:
        first = []
    else:
        first = learned_sink_ids(model) if lead is None else lead
    return _score(model, session, np.asarray(first, np.int32), text, chunk_size)


def _score(model, session, first, text, chunk_size) -> Iterator[Scores]:
    structure, arrays = split(model)
    run = _teacher_forced(structure)
    slots, nbytes = session.cache.capacity, session.cache.nbytes
    unscored = max(len(first) - 1, 0)
    session.cache = place(structure, session.cache)

    def step(window: np.ndarray) -> Scores:
        """Read all but the last of these, which stays pending."""
        nonlocal unscored
        count = len(window) - 1
        session.cache.require_room(count, at=session.position)
        if session.position == 0:
            cache = pinned(model, session.cache, [window[:-1].tolist()])
            session.cache = place(structure, cache)
        inputs, targets = np.zeros((2, 1, chunk_size), np.int32)
        inputs[0, :count], targets[0, :count] = window[:-1], window[1:]
        losses, session.cache = run(
            arrays, session.cache, inputs, targets, np.asarray(count, np.int32)
        )
        session.read([int(token) for token in window[:-1]])
        session.drew(int(window[-1]))
        skip, unscored = min(unscored, count), max(unscored - count, 0)
        evicted = max(session.position - slots, 0)
        statistics = Statistics(session.position, evicted, slots, nbytes, session.dropped)
        return Scores(np.asarray(losses)[0, skip:count], statistics)

    ahead, read = first, False
    for block in text:
        ahead = np.concatenate([ahead, np.asarray(block, np.int32)])
        at = 0
        while len(ahead) - at > chunk_size:
            yield step(ahead[at : at + chunk_size + 1])
            at, read = at + chunk_size, True
        ahead = ahead[at:]
    if len(ahead) > 1:
        yield step(ahead)
    elif not read:
        raise ValueError(
            f"text: expected at least two tokens, what leads it included, got {len(ahead)}"
        )


@functools.lru_cache(maxsize=16)
def _teacher_forced(structure: Structure) -> Callable:
    def run(arrays, cache, inputs, targets, count):
        length = inputs.shape[1]
        positions = jnp.where(jnp.arange(length) < count, cache.next_positions(length), -1)
        output = structure.model(arrays)(inputs, positions=positions, cache=cache)
        return token_nll(output.logits, targets), keep_layout(output.cache)

    return structure.jit(run, donate_argnames=("cache",))
