"""`sinkjax cache-report`: what sinks, policies and bits of a cache cost, in perplexity and in bytes."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from sinkjax.cache import Description, Quantised, Scored, SinkWindow, policies
from sinkjax.cli.options import CacheOptions, Trained, open_run
from sinkjax.cli.record import environment, write_json
from sinkjax.ops import sparse

Name = Literal[
    "streaming", "h2o", "observed", "vatp", "tova", "snapkv", "expected_attention", "knorm",
    "keydiff", "lagkv", "random",
]  # fmt: skip
PatternName = Literal[
    "a_shape", "tri_shape", "vertical_slash", "block_sparse", "flex_prefill", "x_attention"
]
PATTERNS: tuple[PatternName, ...] = get_args(PatternName)
_FILES = tyro.conf.arg(metavar="[FILE ...]", help_behavior_hint="")
_OUT = tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: RUN/cache_report)")


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """Perplexity along a text for caches that differ in one thing at a time.

    Varied are the number of sink tokens, which tokens stay, and bits per number.

    Also the share of the attention to a prompt that sparse prefill keeps.

    Into --out go cache_report.png and summary.json.

    Args:
      run: folder that `sinkjax train` made.
      files: texts, folders or globs, read as one stream; none: what the run held out.
      out: folder for the results.
      sinks: numbers of sink tokens, in a cache of constant size.
      policies: which tokens stay.
      budgets: tokens per head for the policies, as parts of the cache's slots.
      bits: of stored keys and values, with the sink tokens in full precision and without.
      patterns: of sparse prefill, with blocks of a sixteenth of the context length, of 64 at most.
      max_tokens: length of the stream in tokens; None: all of the text.
      chunk_size: tokens per step; policies evict after each, so smaller is closer to decoding.
      cache: the cache that is varied.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    files: Annotated[tuple[str, ...], tyro.conf.Positional, _FILES] = ()
    out: Annotated[str | None, _OUT] = None
    sinks: tuple[int, ...] = (0, 1, 2, 4, 8)
    policies: tuple[Name, ...] = ("streaming", "h2o", "tova", "snapkv", "knorm", "random")
    budgets: tuple[float, ...] = (0.5, 0.25)
    bits: tuple[int, ...] = (8, 4, 2)
    patterns: tuple[PatternName, ...] = PATTERNS
    max_tokens: int | None = 4096
    chunk_size: int = 16
    cache: Annotated[CacheOptions, tyro.conf.arg(name="")] = CacheOptions()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max-tokens: expected at least 2 or None, got {self.max_tokens}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk-size: expected at least 1, got {self.chunk_size}")
        wrong = [part for part in self.budgets if not 0 < part <= 1]
        if wrong:
            raise ValueError(f"budgets: expected parts above 0 and at most 1, got {wrong[0]}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is varied, its value, and the cache."""

    group: Literal["sinks", "policy", "bits"]
    label: str
    description: Description


def run(config: CacheReport) -> int:
    """Measure, print the table, draw, write."""
    from sinkjax.diagnose.page import png
    from sinkjax.diagnose.plots import of_caches
    from sinkjax.files import write_whole

    started = time.perf_counter()
    trained = open_run(config.run)
    base = config.cache.description(trained.config.model.context_length)
    rows = list(variations(config, base))
    tokens = trained.text(config.files)[: config.max_tokens]
    beyond = base.capacity - len(trained.lead) + 1
    if tokens.size <= beyond:
        raise ValueError(
            f"files: expected more than the {beyond} tokens that fill the cache, got {tokens.size}"
        )
    found = []
    length = trained.config.model.context_length
    prompt = np.concatenate([np.asarray(trained.lead, np.int32), tokens])[None, :length]
    prefill = []
    with _progress(len(rows) + len(config.patterns)) as progress:
        for row in rows:
            found.append(_measure(trained, tokens, row, beyond, config.chunk_size))
            progress()
        for name in config.patterns:
            prefill.append(_recall(trained, prompt, name, base.sink_slots))
            progress()
    out = Path(config.run) / "cache_report" if config.out is None else Path(config.out)
    _print(found, f"{config.run}: {tokens.size:,} tokens through {base.capacity} slots")
    if prefill:
        _print_recall(prefill, prompt.shape[1])
    write_whole(out / "cache_report.png", png(of_caches(found)))
    settings = dataclasses.asdict(config) | {"window": base.window, "slots": base.capacity}
    numbers: dict[str, Any] = {
        "settings": settings,
        "beyond": beyond,
        "caches": found,
        "prefill": prefill,
    }
    write_json(out / "summary.json", numbers | environment(trained.config.seed, started))
    return 0


def variations(config: CacheReport, base: SinkWindow) -> Iterator[Row]:
    """The caches that are compared.

    Raises:
      ValueError: more sink tokens than slots, or a budget too small to protect them.
    """
    slots, sinks = base.capacity, base.sink_slots
    for count in config.sinks:
        if not 0 <= count < slots:
            raise ValueError(f"sinks: expected 0 to {slots - 1} of {slots} slots, got {count}")
        yield Row("sinks", str(count), SinkWindow(count, slots - count, base.position_mode))
    for part in config.budgets:
        budget = int(slots * part)
        recent = max(1, budget // 4)
        if budget < sinks + recent:
            raise ValueError(
                f"budgets: expected room for {sinks} sink tokens and {recent} recent ones, "
                f"got {part} of {slots} slots"
            )
        for name in config.policies:
            kept = _policy(name, sinks, budget)
            scored = Scored(kept, budget, sinks, recent, base.position_mode)
            yield Row("policy", f"{name} {budget}", scored)
    residual = max(1, slots // 4)
    group = max(1, min(32, residual // 2))
    yield Row("bits", "full precision", base)
    for bits in config.bits:
        packed = Quantised(base, bits, group_size=group, residual=residual)
        yield Row("bits", f"{bits} bits", packed)
        bare = dataclasses.replace(packed, first_full_precision=0)
        yield Row("bits", f"{bits} bits, sinks too", bare)


def _policy(name: Name, sinks: int, budget: int) -> policies.Policy:
    """By name; what looks back looks back over a quarter of the budget."""
    recent = max(1, budget // 4)
    made: dict[Name, Callable[[], policies.Policy]] = {
        "streaming": policies.StreamingLLM,
        "h2o": policies.H2O,
        "observed": policies.ObservedAttention,
        "vatp": policies.VATP,
        "tova": policies.TOVA,
        "snapkv": lambda: policies.SnapKV(recent),
        "expected_attention": lambda: policies.ExpectedAttention(recent, num_sink_tokens=sinks),
        "knorm": policies.Knorm,
        "keydiff": policies.KeyDiff,
        "lagkv": lambda: policies.LagKV(num_sink_tokens=sinks, lag=recent),
        "random": policies.Random,
    }
    return made[name]()


def _measure(
    trained: Trained, tokens: np.ndarray, row: Row, beyond: int, chunk_size: int
) -> dict[str, Any]:
    from sinkjax.stream import Session, score

    begun = time.perf_counter()
    session = Session.start(trained.model, row.description)
    nbytes = session.cache.nbytes
    parts = score(trained.model, [tokens], cache=session, lead=trained.lead, chunk_size=chunk_size)
    nll = np.concatenate([part.nll for part in parts]).astype(np.float64)
    positions = np.arange(tokens.size - nll.size, tokens.size)
    return {
        "group": row.group,
        "label": row.label,
        "cache": repr(row.description),
        "slots": session.cache.capacity,
        "cache_bytes": nbytes,
        "nll": float(nll.mean()),
        "perplexity": float(np.exp(nll.mean())),
        "nll_beyond": float(nll[positions >= beyond].mean()),
        "seconds": time.perf_counter() - begun,
    }


def _pattern(name: PatternName, length: int, sinks: int) -> sparse.Pattern:
    """By name, cut to a prompt of this length."""
    block = max(1, min(64, length // 16))
    blocks, sinks, near = max(3, length // block // 2), max(1, sinks), max(1, length // 4)
    made: dict[PatternName, Callable[[], sparse.Pattern]] = {
        "a_shape": lambda: sparse.AShape(sinks, near, block),
        "tri_shape": lambda: sparse.TriShape(sinks, near, max(1, length // 16), block),
        "vertical_slash": lambda: sparse.VerticalSlash(
            max(sinks, length // 16), near, min(64, near), sinks, block, blocks, block
        ),
        "block_sparse": lambda: sparse.BlockSparse(blocks, block),
        "flex_prefill": lambda: sparse.FlexPrefill(num_blocks=blocks, block_size=block),
        "x_attention": lambda: sparse.XAttention(
            stride=math.gcd(block, 8), num_blocks=blocks, block_size=block
        ),
    }
    return made[name]()


def _recall(trained: Trained, prompt: np.ndarray, name: PatternName, sinks: int) -> dict[str, Any]:
    from sinkjax.diagnose import sparse_recall

    pattern = _pattern(name, prompt.shape[1], sinks)
    kept = sparse_recall(trained.model, prompt, {name: pattern})[name]
    return {
        "pattern": name,
        "setting": repr(pattern),
        "recall": kept.recall,
        "read": kept.read,
        "truncated": kept.truncated,
    }


def _print_recall(rows: Sequence[dict[str, Any]], length: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"sparse prefill of {length:,} tokens: attention that is kept"
    table = Table(title=title, title_justify="left")
    table.add_column("pattern")
    for head in ("mean", "worst\nhead", "blocks\nread", "blocks cut\nby the budget"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            row["pattern"],
            f"{row['recall'].mean():.1%}",
            f"{row['recall'].min():.1%}",
            f"{row['read'].mean():.0%}",
            f"{row['truncated'].mean():.1f}",
        )
    Console().print(table)


def _print(found: Sequence[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("varied")
    table.add_column("cache")
    for head in ("slots", "cache\nbytes", "perplexity", "nats/token", "nats/token\npast the cache"):
        table.add_column(head, justify="right")
    for before, row in zip([None, *found], found, strict=False):
        if before is not None and before["group"] != row["group"]:
            table.add_section()
        first = before is None or before["group"] != row["group"]
        table.add_row(
            row["group"] if first else "",
            row["label"],
            f"{row['slots']:,}",
            f"{row['cache_bytes']:,}",
            f"{row['perplexity']:.3f}",
            f"{row['nll']:.4f}",
            f"{row['nll_beyond']:.4f}",
        )
    Console().print(table)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, where that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("caches", total=total)
        yield lambda: bar.advance(task)
