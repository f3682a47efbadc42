"""`sinkjax evaluate`: perplexity along a stream."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from sinkjax.cli.options import CacheOptions, open_run
from sinkjax.cli.record import environment, write_json
from sinkjax.stream import Evaluation, evaluate
from sinkjax.stream.evaluate import POLICIES, Policy

_FILES = tyro.conf.arg(metavar="[FILE ...]", help_behavior_hint="")
_CURVE = 100  # points of the curve in the JSON, at most


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity along a text, far past the context, for three ways to look back.

    Every policy may look at C = sinks + window tokens and is led by BOS.

    Args:
      run: folder that `sinkjax train` made.
      files: texts, folders or globs, read as one stream; none: what the run held out.
      policies: recompute encodes the last C tokens anew for each prediction; window caches the
        last C; sink_window caches the first tokens and the last, C in all.
      max_tokens: length of the stream in tokens; None: all of the text.
      every: recompute predicts each n-th token only; it costs C times as much.
      batch_size: rows per step of recompute.
      chunk_size: tokens per step of the caches.
      json: file for the numbers and the curve of nats per token along the stream.
      cache: what the model looks back at.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    files: Annotated[tuple[str, ...], tyro.conf.Positional, _FILES] = ()
    policies: tuple[Policy, ...] = POLICIES
    max_tokens: int | None = 4096
    every: int = 1
    batch_size: int = 8
    chunk_size: int = 256
    json: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    cache: Annotated[CacheOptions, tyro.conf.arg(name="")] = CacheOptions()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max-tokens: expected at least 1 or None, got {self.max_tokens}")
        if not self.policies:
            raise ValueError(f"policies: expected some of {', '.join(POLICIES)}, got none")


def run(config: Evaluate) -> int:
    """Measure, print the table, write the JSON."""
    started = time.perf_counter()
    trained = open_run(config.run)
    cache = config.cache.description(trained.config.model.context_length)
    tokens = trained.text(config.files)[: config.max_tokens]
    with _progress() as progress:
        found = evaluate(
            trained.model,
            tokens,
            policies=config.policies,
            num_sink_tokens=cache.num_sink_tokens,
            window=cache.window,
            position_mode=cache.position_mode,
            max_sink_tokens=cache.max_sink_tokens,
            lead=trained.lead,
            chunk_size=config.chunk_size,
            every=config.every,
            batch_size=config.batch_size,
            progress=progress,
        )
    slots = cache.capacity
    # The first token whose prediction cannot see all of the text before it.
    beyond = slots - len(trained.lead) + 1
    rows = [result.summary(beyond) for result in found.values()]
    _print(config.run, rows, tokens.size, slots)
    if config.json is not None:
        settings = dataclasses.asdict(config) | {"window": cache.window, "slots": slots}
        curves = {policy: _curve(result) for policy, result in found.items()}
        numbers: dict[str, Any] = {"settings": settings, "beyond": beyond, "policies": rows}
        write_json(
            config.json, numbers | {"curves": curves} | environment(trained.config.seed, started)
        )
    return 0


def _print(run: str, rows: list[dict[str, Any]], tokens: int, slots: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{Path(run)}: {tokens:,} tokens through {slots} slots", title_justify="left"
    )
    table.add_column("policy")
    heads = (
        "tokens",
        "perplexity",
        "nats/token",
        "nats/token\npast the cache",
        "cache\nbytes",
        "s",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["policy"]),
            f"{row['tokens']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['nll']:.4f}",
            "-" if np.isnan(row["nll_beyond"]) else f"{row['nll_beyond']:.4f}",
            f"{row['cache_bytes']:,}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)


def _curve(result: Evaluation) -> dict[str, list[float]]:
    """Mean nats per token in equal stretches of the stream, and where each ends."""
    parts = min(_CURVE, result.nll.size)
    stretches = zip(
        np.array_split(result.positions, parts), np.array_split(result.nll, parts), strict=True
    )
    ends, means = zip(*((int(p[-1]), float(n.mean())) for p, n in stretches), strict=True)
    return {"position": list(ends), "nll": list(means)}


@contextmanager
def _progress() -> Iterator[Callable[[Policy, int, int], None] | None]:
    """A bar per policy on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def show(policy: Policy, done: int, total: int) -> None:
            if policy not in tasks:
                tasks[policy] = bar.add_task(policy, total=total)
            bar.update(tasks[policy], completed=done)

        yield show
