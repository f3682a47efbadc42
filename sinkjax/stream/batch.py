"""Continuous batching: streams that share a step, and come and go between steps."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.cache import Cache, Description
from sinkjax.cache.ring import LIMIT
from sinkjax.stream.detect import pinned
from sinkjax.stream.events import Event, Events
from sinkjax.stream.prefill import prefill
from sinkjax.stream.prompt import Overlength, fit, learned_sink_ids, to_feed
from sinkjax.stream.rows import row_functions
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.session import Session
from sinkjax.stream.state import Stream
from sinkjax.stream.steps import functions, key_data
from sinkjax.stream.structure import empty_cache, place, split
from sinkjax.typing import StreamTokenizer


@dataclasses.dataclass
class _Request:
    """A stream in the queue or in a row.

    Args:
        stream: where it stands.
        keys: of its seed.
        cache: of one row: before it has a row, if it has read something.
        feed: tokens that are still to be read, and how many were dropped from them.
        events: gives its events.
        hold: whether it keeps its row after its last token.
        chunked: whether its prompt is read in chunks; one token is read in its row.
        row: None until it has one.
        finished: whether its last event is out.
    """

    id: int
    stream: Stream
    keys: np.ndarray
    cache: Cache | None
    feed: list[int]
    dropped: int
    events: Events
    hold: bool
    chunked: bool
    row: int | None = None
    finished: bool = False


class Batch:
    """A fixed number of rows, each of which serves one stream after the other.

    Every row has a clock and a key of its own and all caches are of one size, so a new stream takes
    a free row without touching the others and without compiling anything. A step reads one token
    in every row that has a stream, and beside that one chunk of the prompt that is next in the
    queue, in a cache of one row: long prompts delay the others by no more than a chunk. A stream
    draws the tokens that `generate` draws with its seed, whoever its neighbours are.

    If the model's parameters lie on a mesh, so does the cache (`sinkjax.sharding.cache_shardings`):
    rows over `data` and `expert`, heads over `model`, and it never moves. A prompt is read by every
    group of devices that could have its row, since one row does not divide; so is every row where
    `rows` is no multiple of those groups. Where a mesh is that of several processes, all of them make the
    same calls and all are given every event.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        cache: what every row keeps.
        rows: number of streams at a time.
        sampler, tokenizer, chunk_size, bos, overlength: as in `generate`, for all streams.

    Raises:
        ValueError: as `model.init_cache`, or no rows.

    Source: Yu et al. 2022 (Orca, OSDI), iteration-level scheduling; Agrawal et al. 2024
    (Sarathi-Serve), arXiv 2403.02310, decoding that goes on beside chunks of a prompt.
    """

    def __init__(
        self,
        model: Any,
        cache: Description,
        *,
        rows: int,
        sampler: Sampler | None = None,
        tokenizer: StreamTokenizer | None = None,
        chunk_size: int = 256,
        bos: bool = True,
        overlength: Overlength = "chunk",
    ):
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        self._cache = empty_cache(model, cache, rows)
        self._fresh = empty_cache(model, cache, 1)
        self._model, self._description = model, cache
        self._tokenizer, self._chunk_size = tokenizer, chunk_size
        self._bos = bos
        self._overlength: Overlength = overlength
        self._structure, self._arrays = split(model)
        self._draw, self._step = functions(
            self._structure, sampler or Sampler(), learned_sink_ids(model)
        )
        self._put, self._take = row_functions(self._structure)
        self._rows: list[_Request | None] = [None] * rows
        self._queue: collections.deque[_Request] = collections.deque()
        self._end = LIMIT if self._cache.limit is None else self._cache.limit
        self._ids = 0
        self._unsent: dict[int, Event] = {}

    @property
    def active(self) -> tuple[int, ...]:
        """Ids that have a row."""
        return tuple(request.id for request in self._rows if request is not None)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Ids in the queue, the next one first, which may be part of the way through its prompt."""
        return tuple(request.id for request in self._queue)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache of all rows; a prompt that is being read has another row's beside it."""
        return self._cache.nbytes

    def admit(
        self,
        prompt: str | Sequence[int] = (),
        *,
        session: Session | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        hold: bool = False,
    ) -> int:
        """Put a stream into the queue; it gets a row in one of the coming steps.

        Args:
            prompt: as in `generate`.
            session: to go on with, of the same description; a copy of it is taken, so it may be
                admitted several times, each with a prompt of its own.
            seed, max_new_tokens, stop_tokens, stop_strings: as in `generate`.
            hold: keep the row after the last token until `retire`, so that `session` can copy it.

        Returns:
            the id of the stream.

        Raises:
            ValueError: bad arguments, a prompt that does not fit, or a session of another cache.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1 or None, got {max_new_tokens}")
        if session is None:
            stream, cache = Stream(seed=seed or 0), None
        else:
            if seed is not None:
                raise ValueError(f"seed: a session has its own ({session.seed}), got {seed}")
            if session.cache.description != self._description:
                raise ValueError(
                    f"session: expected a cache of {self._description}, "
                    f"got {session.cache.description}"
                )
            session.check(self._model)
            fields = [field.name for field in dataclasses.fields(Stream)]
            stream = Stream(**{name: getattr(session, name) for name in fields})
            cache = place(self._structure, session.fork().cache)
        tokens = to_feed(
            self._model,
            prompt,
            self._tokenizer,
            bos=self._bos,
            position=stream.position,
            pending=stream.pending,
        )
        tokens, dropped = fit(tokens, self._cache, stream.position, self._overlength)
        self._cache.require_room(len(tokens), at=stream.position)
        events = Events(
            stream,
            self._tokenizer,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            stop_strings=stop_strings,
            slots=self._cache.capacity,
            nbytes=self._cache.nbytes // len(self._rows),
        )
        self._ids += 1
        self._queue.append(
            _Request(
                id=self._ids,
                stream=stream,
                keys=key_data(stream.seed),
                cache=cache,
                feed=tokens,
                dropped=dropped,
                events=events,
                hold=hold,
                chunked=len(tokens) > 1,
            )
        )
        return self._ids

    def retire(self, id: int) -> None:
        """Take a stream out of its row or of the queue, finished or not.

        Raises:
            ValueError: it is not there.
        """
        request = self._find(id)
        if request.row is None:
            self._queue.remove(request)
        else:
            self._rows[request.row] = None

    def session(self, id: int) -> Session:
        """A copy of a stream that has a row: to save, to continue elsewhere, to admit again (fork).

        Raises:
            ValueError: it has no row.
        """
        request = self._find(id)
        if request.row is None:
            raise ValueError(f"id: stream {id} has no row yet")
        return Session(self._take(self._cache, request.row), **dataclasses.asdict(request.stream))

    def step(self) -> dict[int, Event]:
        """Draw one token in every row that has a stream, and read a chunk of the next prompt.

        Returns:
            the event of each stream that drew a token; none when there is nothing to do, or all is
            waiting for a long prompt.

        Raises:
            FloatingPointError: logits of a stream are not numbers; it is retired, and the next step
                goes on with the others.
        """
        if self._unsent:
            events, self._unsent = self._unsent, {}
            return events
        events: dict[int, Event] = {}
        broken = [*self._decode(events), *self._prefill(events)]
        if broken:
            self._unsent = events
            raise FloatingPointError("; ".join(broken))
        return events

    def run(self) -> Iterator[tuple[int, Event]]:
        """Step until no stream is left that could draw; more may be admitted meanwhile."""
        while self._unsent or self._queue or self._live():
            yield from self.step().items()
            if self._queue and not self._live() and None not in self._rows:
                raise ValueError("hold: every row is held by a finished stream; retire one")

    def _live(self) -> list[_Request]:
        return [r for r in self._rows if r is not None and not r.finished]

    def _decode(self, events: dict[int, Event]) -> list[str]:
        """One token in every row."""
        live = self._live()
        if not live:
            return []
        tokens = np.zeros((len(self._rows), 1), np.int32)
        active = np.zeros(len(self._rows), bool)
        keys = np.zeros((len(self._rows), *live[0].keys.shape), live[0].keys.dtype)
        for request in live:
            row = request.row
            tokens[row], active[row], keys[row] = request.feed[0], True, request.keys
        self._cache.require_room(1, at=np.asarray([r.stream.position for r in live]))
        drawn, logprob, self._cache = self._step(self._arrays, self._cache, tokens, keys, active)
        drawn, logprob = np.asarray(drawn), np.asarray(logprob)
        results = [self._drawn(r, r.feed, drawn[r.row], logprob[r.row], events) for r in live]
        return [said for said in results if said is not None]

    def _prefill(self, events: dict[int, Event]) -> list[str]:
        """One chunk of the next prompt, and the row for it when that was the last."""
        if not self._queue or None not in self._rows:
            return []
        request, said = self._queue[0], None
        cache = request.cache
        if cache is None:
            cache = pinned(self._model, jax.tree.map(jnp.copy, self._fresh), [request.feed])
            cache = place(self._structure, cache)
        if request.chunked:
            size = self._chunk_size
            part, request.feed = request.feed[:size], request.feed[size:]
            logits, cache = prefill(self._model, cache, np.asarray([part]), chunk_size=size)
            if request.feed:
                request.stream.read(part)
                request.cache = cache
                return []
            drawn, logprob = self._draw(logits, cache.time, request.keys[None])
            said = self._drawn(request, part, drawn[0], logprob[0], events)
        self._queue.popleft()
        if said is None and (request.hold or not request.finished):
            row = self._rows.index(None)
            self._cache = self._put(self._cache, cache, row)
            self._rows[row], request.row, request.cache = request, row, None
        return [] if said is None else [said]

    def _drawn(self, request, read, token, logprob, events) -> str | None:
        """Note a token that was drawn after reading some; or what is wrong with it."""
        stream = request.stream
        stream.read(read, request.dropped)
        request.dropped = 0
        if np.isnan(logprob):
            if request.row is not None:
                self._rows[request.row] = None
            return f"the model's logits of stream {request.id} at {stream.position} are NaN"
        room = stream.position < self._end
        event = request.events.drawn(int(token), float(logprob), room=room)
        events[request.id], request.feed = event, [event.token]
        request.finished = event.finish_reason is not None
        if request.finished and not request.hold and request.row is not None:
            self._rows[request.row] = None
        return None

    def _find(self, id: int) -> _Request:
        for request in (*self._rows, *self._queue):
            if request is not None and request.id == id:
                return request
        raise ValueError(
            f"id: expected one of {[*self.active, *self.waiting]}, which have a row or wait for "
            f"one, got {id}"
        )
