"""`sinkjax stream`: the perplexity of a text of any length, as it is read."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from sinkjax.cli.options import CacheOptions, open_run
from sinkjax.cli.record import environment, write_json
from sinkjax.cli.terminal import Interrupt, interrupts
from sinkjax.stream import Scores, Session, score
from sinkjax.typing import Tokenizer

_BLOCK = 1 << 14  # bytes read at a time
_INPUT = tyro.conf.arg(metavar="FILE")
_PATH = tyro.conf.arg(metavar="PATH", help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Stream:
    """Read a text of any length through a cache of constant size.

    Prints the perplexity of its stretches, and of all of it up to each.

    Ctrl-C ends it with the numbers so far.

    Args:
      run: folder that `sinkjax train` made.
      input: a text file, or - for standard input.
      stretches: rows of the table, at most: stretches of equal length that double when they get too
        many.
      chunk_size: tokens per step.
      json: file for the numbers.
      save: file for the session at the end, for `sinkjax chat --session`.
      cache: what the model looks back at.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    input: Annotated[str, _INPUT]
    stretches: int = 16
    chunk_size: int = 256
    json: Annotated[str | None, _PATH] = None
    save: Annotated[str | None, _PATH] = None
    cache: Annotated[CacheOptions, tyro.conf.arg(name="")] = CacheOptions()

    def __post_init__(self) -> None:
        if self.stretches < 2:
            raise ValueError(f"stretches: expected at least 2, got {self.stretches}")


@dataclasses.dataclass
class _Stretch:
    """Tokens that follow one another: how many, what they cost in nats, how long they took."""

    tokens: int = 0
    nats: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "_Stretch") -> "_Stretch":
        return _Stretch(
            self.tokens + other.tokens, self.nats + other.nats, self.seconds + other.seconds
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan


class _Stretches:
    """A text of unknown length in at most `most` stretches of equal length."""

    def __init__(self, most: int, first: int):
        self._most, self._length = most, first
        self.list: list[_Stretch] = [_Stretch()]

    def add(self, nll: np.ndarray, seconds: float) -> None:
        """A chunk; it goes to the stretch that it begins in."""
        if self.list[-1].tokens >= self._length:
            self.list.append(_Stretch())
            if len(self.list) > self._most:
                pairs = zip(self.list[::2], [*self.list[1::2], _Stretch()], strict=False)
                self.list = [a + b for a, b in pairs]
                self._length *= 2
        cost = float(np.sum(nll, dtype=np.float64))
        self.list[-1] += _Stretch(nll.size, cost, seconds)

    @property
    def whole(self) -> _Stretch:
        return sum(self.list, _Stretch())


def run(config: Stream) -> int:
    """Read, print the table, write the JSON.

    Raises:
      KeyboardInterrupt: Ctrl-C; what there was is printed and written.
    """
    started = time.perf_counter()
    trained = open_run(config.run)
    description = config.cache.description(trained.config.model.context_length)
    session = Session.start(trained.model, description)
    stretches = _Stretches(config.stretches, config.chunk_size)
    timed = _Stretch()  # but for the first chunk, which compiles
    last: Scores | None = None
    with (
        _opened(config.input) as (read, size),
        interrupts() as interrupt,
        _progress(size) as progress,
    ):
        source = _Source(read, interrupt)
        parts = score(
            trained.model,
            _blocks(source, trained.tokenizer, config.input),
            cache=session,
            lead=trained.lead,
            chunk_size=config.chunk_size,
        )
        since = time.perf_counter()
        for part in parts:
            now = time.perf_counter() - source.waited  # a pipe may be slower than the model
            seconds, since = now - since, now
            stretches.add(part.nll, seconds)
            if last is not None:
                timed += _Stretch(part.nll.size, 0.0, seconds)
            last = part
            if progress is not None:
                progress(source.bytes, stretches.whole, timed, part)
            if interrupt.pressed:
                break
    if last is None:  # `score` gives something or raises
        raise ValueError("input: expected text, got none")
    numbers = _numbers(stretches, timed, last)
    _print(config, numbers)
    if config.save is not None:
        session.save(config.save)
    if config.json is not None:
        settings = dataclasses.asdict(config) | {"description": str(description)}
        about = {"settings": settings, "interrupted": interrupt.pressed}
        write_json(config.json, about | numbers | environment(trained.config.seed, started))
    if interrupt.pressed:
        raise KeyboardInterrupt
    return 0


def _numbers(stretches: _Stretches, timed: _Stretch, last: Scores) -> dict[str, Any]:
    rows, begin = [], 0
    for stretch in stretches.list:
        if stretch.tokens:
            end = begin + stretch.tokens
            speed = stretch.tokens / stretch.seconds
            rows.append(
                {
                    "begin": begin,
                    "end": end,
                    "perplexity": stretch.perplexity,
                    "tokens_per_second": speed,
                }
            )
            begin = end
    whole = stretches.whole
    speed = timed.tokens / timed.seconds if timed.tokens else None
    return {
        "tokens": whole.tokens,
        "nll": whole.nats / whole.tokens,
        "perplexity": whole.perplexity,
        "tokens_per_second": speed,
        "evicted": last.statistics.evicted,
        "cache_slots": last.statistics.cache_slots,
        "cache_bytes": last.statistics.cache_bytes,
        "stretches": rows,
    }


def _print(config: Stream, numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    name = "standard input" if config.input == "-" else str(Path(config.input))
    print(f"{Path(config.run)}: {name}")
    table = Table()
    for head in ("tokens", "perplexity", "so far", "tokens/s"):
        table.add_column(head, justify="right")
    nats, tokens = 0.0, 0
    for row in numbers["stretches"]:
        length = row["end"] - row["begin"]
        nats, tokens = nats + length * math.log(row["perplexity"]), tokens + length
        so_far = math.exp(nats / tokens)
        table.add_row(
            f"{row['begin']:,} - {row['end']:,}",
            f"{row['perplexity']:.3f}",
            f"{so_far:.3f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    Console().print(table)
    speed = numbers["tokens_per_second"]
    print(
        f"{numbers['tokens']:,} tokens, perplexity {numbers['perplexity']:.3f}, "
        + (f"{speed:,.0f} tokens/s, " if speed is not None else "")
        + f"{numbers['evicted']:,} evicted, "
        f"cache {numbers['cache_bytes']:,} bytes in {numbers['cache_slots']:,} slots"
    )


Read = Callable[[int], bytes]
"""Gives the bytes that are there, at most so many, and waits only where there are none."""


class _Source:
    """Bytes of a file, which may be a pipe that is still written to, and how many there were.

    They end at Ctrl-C, too.

    Args:
      read: of the file.
      interrupt: tells of Ctrl-C.
    """

    def __init__(self, read: Read, interrupt: Interrupt):
        self._read, self.interrupt = read, interrupt
        self.bytes, self.waited = 0, 0.0

    def __iter__(self) -> Iterator[bytes]:
        while not self.interrupt.pressed:
            begun = time.perf_counter()
            try:
                with self.interrupt.may_break():
                    content = self._read(_BLOCK)
            except KeyboardInterrupt:
                return
            if not content:
                return
            self.waited += time.perf_counter() - begun
            self.bytes += len(content)
            yield content


def _blocks(source: "_Source", tokenizer: Tokenizer, name: str) -> Iterator[np.ndarray]:
    """Ids of the text.

    Raises:
      ValueError: there is none.
      KeyboardInterrupt: there is none because of Ctrl-C.
    """
    for block in cut(source):
        yield tokenizer.encode_bytes(block)
    if source.bytes == 0:
        if source.interrupt.pressed:
            raise KeyboardInterrupt
        raise ValueError(f"input: expected text, {name}: empty")


def cut(source: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that end where a tokenizer does not notice: at the ends of lines."""
    held = b""
    for content in source:
        held += content
        end = held.rfind(b"\n") + 1
        if end == 0 and len(held) >= _BLOCK:  # a line without end: between words
            end = held.rfind(b" ")
            end = len(held) if end < 1 else end
        if end:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


@contextmanager
def _opened(name: str) -> Iterator[tuple[Read, int | None]]:
    """How to read a file, and its size in bytes; None where that is not known."""
    if name == "-":
        if sys.stdin is None:
            raise ValueError("input: there is no standard input")
        stdin: Any = sys.stdin.buffer
        yield stdin.read1, None
        return
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield file.read1, size or None


@contextmanager
def _progress(size: int | None) -> Iterator[Callable[..., None] | None]:
    """A bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        BarColumn(),
        TextColumn("{task.fields[said]}  left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("stream", total=size, said="")

        def show(read: int, whole: _Stretch, timed: _Stretch, part: Scores) -> None:
            speed = f"{timed.tokens / timed.seconds:,.0f}" if timed.tokens else "-"
            said = (
                f"{whole.tokens:,} tokens  perplexity {whole.perplexity:.3f}  {speed} tokens/s  "
                f"{part.statistics.evicted:,} evicted"
            )
            bar.update(task, completed=read, said=said)

        yield show
