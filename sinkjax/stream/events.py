"""What a stream tells with every token: the token, its text, and where the stream stands."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, TypeAlias

from sinkjax.stream.state import Stream
from sinkjax.stream.stop import StopStrings
from sinkjax.typing import StreamDecoder, StreamTokenizer

FinishReason: TypeAlias = Literal["stop", "length"]


class Statistics(NamedTuple):
    """Where a stream stands after a token.

    position: of the token, in tokens from the start of the stream. evicted: earlier tokens that no
    layer can look at any more. cache_slots: C. cache_bytes: of all arrays of the cache, constant.
    dropped: tokens of prompts that were left out before the model read them (`overlength`).
    """

    position: int
    evicted: int
    cache_slots: int
    cache_bytes: int
    dropped: int = 0


class Event(NamedTuple):
    """One token of a stream.

    token: its id. text: what it adds to the text; empty inside a character or without a tokenizer.
    logprob: natural logarithm of its probability under the model, before the sampler.
    finish_reason: None, or on the last event why it is the last: "stop" (a stop token or string was
    drawn), "length" (all tokens that were asked for).
    """

    token: int
    text: str
    logprob: float
    statistics: Statistics
    finish_reason: FinishReason | None = None


class Events:
    """Makes the events of one stream from what is drawn, and keeps its state up to date.

    Args:
        stream: has read whatever comes before the token that is drawn.
        tokenizer: gives the text, or None.
        max_new_tokens, stop_tokens, stop_strings: when the stream ends.
        slots, nbytes: C, and the bytes of the cache.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: StreamTokenizer | None,
        *,
        max_new_tokens: int | None,
        stop_tokens: Collection[int],
        stop_strings: Sequence[str],
        slots: int,
        nbytes: int,
    ):
        if max_new_tokens is not None and max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0 or None, got {max_new_tokens}")
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings: texts need tokenizer=, got none; or give stop_tokens")
        self._stream = stream
        self._tokenizer = tokenizer
        self._decoder: StreamDecoder | None = None
        self._left = max_new_tokens
        self._stop_tokens = frozenset(stop_tokens)
        self._stops = StopStrings(stop_strings)
        self._slots, self._nbytes = slots, nbytes

    def drawn(self, token: int, logprob: float, *, room: bool = True) -> Event:
        """The event of a token; `room`: whether the cache could take it and draw another."""
        stream = self._stream
        if self._tokenizer is not None and self._decoder is None:
            self._decoder = self._tokenizer.stream_decoder()
            for earlier in stream.tail:  # a prompt or a stop may have cut a character
                self._decoder.push(earlier)
        stream.drew(token)
        text, stopped = "", token in self._stop_tokens
        if self._decoder is not None:
            text, found = self._stops.push(self._decoder.push(token))
            stopped = stopped or found
        if self._left is not None:
            self._left -= 1
        reason: FinishReason | None = None
        if stopped:
            reason = "stop"
        elif self._left == 0 or not room:
            reason = "length"
        if reason is not None:
            text += self._stops.flush()
        statistics = Statistics(
            stream.position,
            max(stream.position - self._slots, 0),
            self._slots,
            self._nbytes,
            stream.dropped,
        )
        return Event(token, text, logprob, statistics, reason)
