"""`sinkjax generate`: text on the terminal as it comes."""

import dataclasses
import re
import sys
import time
from typing import Annotated

import tyro

from sinkjax.cli.options import CacheOptions, open_run
from sinkjax.stream import Sampler, generate

_PROMPT = tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")
# What a byte model may send to a terminal by accident: all control characters but \t and \n.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Stream text from a run to standard output, in constant memory.

    Numbers follow on standard error. Ctrl-C ends the stream.

    Args:
      run: folder that `sinkjax train` made.
      prompt: text to continue; without one it is read from standard input, if that is no terminal.
      cache: what the model looks back at.
      sampler: how a token is drawn.
      max_new_tokens: tokens to draw; None: until Ctrl-C.
      seed: of the sampler.
      chunk_size: tokens of the prompt per step.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    prompt: Annotated[str | None, tyro.conf.Positional, _PROMPT] = None
    max_new_tokens: int | None = 256
    seed: int = 0
    chunk_size: int = 256
    cache: Annotated[CacheOptions, tyro.conf.arg(name="")] = CacheOptions()
    sampler: Annotated[Sampler, tyro.conf.arg(name="")] = Sampler()


def run(config: Generate) -> int:
    """Stream, then say how fast and how large."""
    trained = open_run(config.run)
    prompt = config.prompt
    if prompt is None:
        prompt = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    cache = config.cache.description(trained.config.model.context_length)
    events = generate(
        trained.model,
        prompt,
        cache=cache,
        sampler=config.sampler,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        tokenizer=trained.tokenizer,
        chunk_size=config.chunk_size,
        bos=trained.has_bos,
    )
    terminal = sys.stdout.isatty()
    tokens, statistics, begun = 0, None, time.perf_counter()
    try:
        for event in events:
            tokens, statistics = tokens + 1, event.statistics
            if tokens <= 2:
                begun = time.perf_counter()  # the prompt and both compilations are behind
            sys.stdout.write(_CONTROL.sub("\ufffd", event.text) if terminal else event.text)
            sys.stdout.flush()
    finally:
        if statistics is not None:
            seconds = time.perf_counter() - begun
            speed = f"{(tokens - 2) / seconds:,.0f} tokens/s, " if tokens > 2 else ""
            print(
                f"\n{tokens:,} tokens, {speed}{statistics.evicted:,} evicted, "
                f"cache {statistics.cache_bytes:,} bytes in {statistics.cache_slots:,} slots",
                file=sys.stderr,
            )
    return 0
