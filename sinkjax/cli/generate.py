"""`sinkjax generate`: text on the terminal as it comes."""

import dataclasses
import sys
import time
from typing import Annotated

import tyro

from sinkjax.cli.options import CacheOptions, open_run
from sinkjax.cli.terminal import harmless, numbers
from sinkjax.stream import Sampler, generate
from sinkjax.stream.prompt import Overlength

_PROMPT = tyro.conf.arg(metavar="[PROMPT]", help_behavior_hint="")


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
      stop: texts that end the stream; it ends before them.
      overlength: of a prompt longer than the cache, chunk reads everything, truncate_middle its two
        ends, and error refuses it.
      seed: of the sampler.
      chunk_size: tokens of the prompt per step.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    prompt: Annotated[str | None, tyro.conf.Positional, _PROMPT] = None
    max_new_tokens: int | None = 256
    stop: tuple[str, ...] = ()
    overlength: Overlength = "chunk"
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
        stop_strings=config.stop,
        tokenizer=trained.tokenizer,
        chunk_size=config.chunk_size,
        bos=trained.has_bos,
        overlength=config.overlength,
    )
    terminal = sys.stdout.isatty()
    tokens, statistics, begun = 0, None, time.perf_counter()
    try:
        for event in events:
            tokens, statistics = tokens + 1, event.statistics
            if tokens <= 2:
                begun = time.perf_counter()  # the prompt and both compilations are behind
            sys.stdout.write(harmless(event.text) if terminal else event.text)
            sys.stdout.flush()
    finally:
        if statistics is not None:
            seconds = time.perf_counter() - begun
            print("\n" + numbers(tokens, seconds, statistics), file=sys.stderr)
    return 0
