"""`sinkjax chat`: a conversation with a run, on a cache of constant size."""

import contextlib
import dataclasses
import sys
import time
from typing import Annotated, Literal

import tyro

from sinkjax.cli.options import CacheOptions, open_run
from sinkjax.cli.terminal import harmless, interrupts, numbers
from sinkjax.stream import TEMPLATES, Sampler, Session
from sinkjax.stream import Chat as Conversation
from sinkjax.stream.prompt import Overlength

_COMMANDS = "/reset, /save PATH, /stats, /quit"
_PATH = tyro.conf.arg(metavar="PATH", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk with a run, a line a turn, in constant memory.

    Numbers follow each answer on standard error. Lines may come from a pipe.

    Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does.

    Lines that begin with / are commands: /reset, /save PATH, /stats, /quit.

    Args:
      run: folder that `sinkjax train` made.
      system: text before the first turn.
      template: how turns are marked; plain: a line each.
      stop: more texts that end an answer.
      session: file of /save to go on with; it has its own cache and seed.
      max_new_tokens: most tokens of an answer; None: until it stops, or Ctrl-C.
      overlength: of a turn longer than the cache, chunk reads everything, truncate_middle its two
        ends, and error refuses it.
      seed: of the sampler; None: 0, or that of the session.
      chunk_size: tokens of a turn per step.
      cache: what the model looks back at.
      sampler: how a token is drawn.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    system: str = ""
    template: Literal["plain", "chatml", "gemma", "llama3"] = "plain"
    stop: tuple[str, ...] = ()
    session: Annotated[str | None, _PATH] = None
    max_new_tokens: int | None = 256
    overlength: Overlength = "chunk"
    seed: int | None = None
    chunk_size: int = 64
    cache: Annotated[CacheOptions, tyro.conf.arg(name="")] = CacheOptions()
    sampler: Annotated[Sampler, tyro.conf.arg(name="")] = Sampler()


def run(config: Chat) -> int:
    """Read a line, answer it, until there are no more."""
    trained = open_run(config.run)
    cache = (
        config.cache.description(trained.config.model.context_length)
        if config.session is None
        else Session.load(config.session)
    )
    chat = Conversation(
        trained.model,
        cache=cache,
        tokenizer=trained.tokenizer,
        template=TEMPLATES[config.template],
        system=config.system,
        sampler=config.sampler,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        stop_strings=config.stop,
        chunk_size=config.chunk_size,
        bos=trained.has_bos,
        overlength=config.overlength,
    )
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` a history and keys to edit with
        _say(f"{_size(chat.session)}; {_COMMANDS}; Ctrl-C stops an answer")
    while (line := _line(terminal)) is not None:
        if line == "/quit":
            break
        if line.startswith("/"):
            _obey(chat, line)
        elif line:
            _answer(chat, line, terminal)
    return 0


def _line(terminal: bool) -> str | None:
    """The next line, or None at the end of the input and when Ctrl-C is pressed at a prompt."""
    if not terminal:
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.strip() if line else None
    try:
        if sys.stdout.isatty():
            return input("> ").strip()
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _obey(chat: Conversation, line: str) -> None:
    command, _, word = line.partition(" ")
    try:
        if command == "/reset" and not word:
            chat.reset()
            _say("a new conversation")
        elif command == "/stats" and not word:
            session = chat.session
            evicted = max(session.position - session.cache.capacity, 0)
            dropped = f", {session.dropped:,} dropped" if session.dropped else ""
            _say(
                f"{session.position:,} tokens read, {evicted:,} evicted{dropped}, {_size(session)}"
            )
        elif command == "/save" and word:
            chat.session.save(word)
            _say(f"saved {word}; go on with --session {word}")
        else:
            _say(f"{line!r} is no command; expected one of {_COMMANDS}")
    except OSError as error:
        _say(f"{error.strerror or error}: {word}")


def _answer(chat: Conversation, line: str, terminal: bool) -> None:
    """One turn, and its numbers.

    Raises:
      KeyboardInterrupt: Ctrl-C twice, or once where nobody sits at a prompt.
    """
    try:
        events = chat.send(line)
    except ValueError as error:
        if not terminal:
            raise
        _say(str(error))  # the turn was not read: another may be shorter
        return
    tokens, statistics, begun = 0, None, time.perf_counter()
    screen = sys.stdout.isatty()
    with interrupts() as interrupt:
        for event in events:
            tokens, statistics = tokens + 1, event.statistics
            if tokens <= 2:
                begun = time.perf_counter()
            sys.stdout.write(harmless(event.text) if screen else event.text)
            sys.stdout.flush()
            if interrupt.pressed:
                break
    seconds = time.perf_counter() - begun
    print(flush=True)
    if statistics is not None:
        said = numbers(tokens, seconds, statistics)
        _say(f"{said}, stopped" if interrupt.pressed else said)
    if interrupt.pressed and not terminal:
        raise KeyboardInterrupt


def _size(session: Session) -> str:
    cache = session.cache
    return f"cache {cache.nbytes:,} bytes in {cache.capacity:,} slots"


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
