"""A conversation on one session: turn by turn, without end, on a cache of constant size."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

from sinkjax.cache import Description
from sinkjax.stream.events import Event
from sinkjax.stream.generate import generate
from sinkjax.stream.prompt import Overlength
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.session import Session
from sinkjax.typing import StreamTokenizer

Marker: TypeAlias = str | tuple[int, ...]
"""Text, or ids for tokens that no text encodes to."""


@dataclasses.dataclass(frozen=True)
class Role:
    """What stands before and after the words of one side."""

    prefix: Marker = ""
    suffix: Marker = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written down: `prefix + words + suffix` for each turn.

    The model's answer begins after `assistant.prefix` and ends when it has drawn a stop, or as many
    tokens as it may. Whatever of `assistant.suffix` it has not drawn itself is fed before the next
    turn, so a conversation reads alike whether an answer ended by itself or was cut.

    Args:
        user, assistant, system: markers of the three sides.
        stop: texts that end an answer; one that is a single token also as that token, which is how
            special tokens are found. Empty: `assistant.suffix`.
    """

    user: Role = Role("", "\n")
    assistant: Role = Role("", "\n")
    system: Role = Role("", "\n")
    stop: tuple[str, ...] = ()


PLAIN = Template()
"""A line of the user, a line of the model: for models of plain text."""

CHATML = Template(
    Role("<|im_start|>user\n", "<|im_end|>\n"),
    Role("<|im_start|>assistant\n", "<|im_end|>\n"),
    Role("<|im_start|>system\n", "<|im_end|>\n"),
    stop=("<|im_end|>",),
)
"""Qwen, SmolLM and many more."""

GEMMA = Template(
    Role("<start_of_turn>user\n", "<end_of_turn>\n"),
    Role("<start_of_turn>model\n", "<end_of_turn>\n"),
    Role("<start_of_turn>user\n", "<end_of_turn>\n"),
    stop=("<end_of_turn>",),
)
"""Gemma 2 and 3, which know no system side: it is a first turn of the user."""

LLAMA3 = Template(
    Role("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    Role("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    Role("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
)
"""Llama 3."""

TEMPLATES = {"plain": PLAIN, "chatml": CHATML, "gemma": GEMMA, "llama3": LLAMA3}


class Chat:
    """A conversation: `send` a turn, and iterate over the events of the answer.

    Nothing is reserved for an answer and nothing is read twice: a turn is fed to the cache as it
    stands, which evicts as in any stream, so turn 10,000 costs what turn 10 did.

    Args:
        model: a decoder such as `sinkjax.models.Decoder`.
        cache: a description for a new conversation, or a `Session` to go on with.
        tokenizer: of the model.
        template: how turns are written down.
        system: what stands before the first turn of a new conversation.
        sampler, seed, max_new_tokens, chunk_size, bos, overlength: as in `generate`; the number is
            that of each answer.
        stop_tokens, stop_strings: of every answer, besides those of the template.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache: Description | Session,
        tokenizer: StreamTokenizer,
        template: Template = PLAIN,
        system: str = "",
        sampler: Sampler | None = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        chunk_size: int = 256,
        bos: bool = True,
        overlength: Overlength = "chunk",
    ):
        if isinstance(cache, Session):
            if seed is not None:
                raise ValueError(f"seed: a session has its own ({cache.seed}), got {seed}")
            cache.check(model)
            self.session = cache
        else:
            self.session = Session.start(model, cache, seed=seed or 0)
        self._model, self._tokenizer = model, tokenizer
        self._template, self._system = template, system
        tokens, strings = _stops(template, tokenizer)
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "sampler": sampler,
            "max_new_tokens": max_new_tokens,
            "stop_tokens": {*stop_tokens, *tokens},
            "stop_strings": (*strings, *stop_strings),
            "chunk_size": chunk_size,
            "bos": bos,
            "overlength": overlength,
        }

    def send(self, text: str) -> Iterator[Event]:
        """Say something, and iterate over the answer.

        The turn is fed when the first event is asked for. An iterator that is left early is an
        answer that was cut: the conversation goes on from there.

        Raises:
            ValueError: at once when the turn does not fit (`overlength`).
        """
        ids = self._turn(text)
        return generate(self._model, ids, cache=self.session, **self._options)

    def reset(self) -> None:
        """Begin a new conversation, with the same seed and an empty cache."""
        session = self.session
        self.session = Session.start(self._model, session.cache.description, seed=session.seed)

    def _turn(self, text: str) -> list[int]:
        """Ids from the end of the last answer to the beginning of the next."""
        user, assistant, system = (
            self._template.user,
            self._template.assistant,
            self._template.system,
        )
        session, ids = self.session, self._ids
        if session.position == 0 and session.pending is None:
            before = []
            if self._system:
                before = ids(system.prefix) + ids(self._system) + ids(system.suffix)
            before += ids(user.prefix)
        else:
            before = ids(assistant.suffix) + ids(user.prefix)
            before = before[_overlap(session.tail, before) :]
        return before + ids(text) + ids(user.suffix) + ids(assistant.prefix)

    def _ids(self, marker: Marker) -> list[int]:
        if isinstance(marker, str):
            return [int(i) for i in self._tokenizer.encode(marker)] if marker else []
        return list(marker)


def _stops(template: Template, tokenizer: StreamTokenizer) -> tuple[set[int], tuple[str, ...]]:
    """Tokens and texts that end an answer."""
    texts, suffix = template.stop, template.assistant.suffix
    if not texts:
        if not isinstance(suffix, str):
            return set(suffix[:1]), ()
        texts = (suffix,) if suffix else ()
    encoded = [tokenizer.encode(text) for text in texts]
    return {int(ids[0]) for ids in encoded if len(ids) == 1}, texts


def _overlap(tail: Sequence[int], coming: Sequence[int]) -> int:
    """How many of the coming tokens the tail ends with already."""
    most = min(len(tail), len(coming))
    return next(n for n in range(most, -1, -1) if list(tail[len(tail) - n :]) == list(coming[:n]))
