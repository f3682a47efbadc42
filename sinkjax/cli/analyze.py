"""`sinkjax analyze`: numbers, pictures and one page about the sinks of a run."""

import dataclasses
import re
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from sinkjax.cli.options import open_run
from sinkjax.cli.record import environment, write_json
from sinkjax.diagnose import (
    METRICS,
    Report,
    Settings,
    analyze,
    capturable,
    capture,
    plots,
    write_report,
)
from sinkjax.diagnose.page import png
from sinkjax.diagnose.report import number
from sinkjax.files import write_whole
from sinkjax.train.log import read_metrics

_FILES = tyro.conf.arg(metavar="[FILE ...]", help_behavior_hint="")
_METRICS = tyro.conf.arg(metavar="{" + ",".join(METRICS) + "} ...", help_behavior_hint="")
_OUT = tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: RUN/analysis)")
_MAP = 64  # tokens of an attention map: more cannot be read
_LAYERS = 6  # columns that fit on a terminal


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Measure and draw the sinks of a run.

    Into --out go report.html, figures/*.png and summary.json.

    Args:
      run: folder that `sinkjax train` made.
      files: texts, folders or globs; none: what the run held out.
      out: folder for the results.
      metrics: which to measure; none: all.
      max_rows: rows of text, of the context length each, BOS first.
      settings: what has to be named beside a sink number.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    files: Annotated[tuple[str, ...], tyro.conf.Positional, _FILES] = ()
    out: Annotated[str | None, _OUT] = None
    metrics: Annotated[tuple[str, ...], _METRICS] = ()
    max_rows: int = 32
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max-rows: expected at least 1, got {self.max_rows}")


def run(config: Analyze) -> int:
    """Measure, draw, write, and print what is most asked for."""
    started = time.perf_counter()
    trained = open_run(config.run)
    length = trained.config.model.context_length
    rows = _rows(trained.text(config.files), trained.lead, length, config.max_rows)
    report = analyze(trained.model, rows, metrics=config.metrics or None, settings=config.settings)
    first = rows[:1, :_MAP]
    weights = capture(capturable(trained.model), first).weights
    names = [trained.tokenizer.decode([token]) for token in first[0]]
    figures = plots.of_report(report, np.asarray(weights)[:, 0], names)
    history = read_metrics(Path(config.run) / "metrics.jsonl")
    if any(record.get("split") == "validation" for record in history):
        figures["How the sink formed in training"] = plots.over_steps(history)

    out = Path(config.run) / "analysis" if config.out is None else Path(config.out)
    for caption, figure in figures.items():
        write_whole(out / "figures" / f"{_slug(caption)}.png", png(figure))
    page = out / "report.html"
    write_report(report, figures, page, title=f"Attention sinks of {config.run}")
    settings = dataclasses.asdict(config)
    record = report.to_dict() | {"command": settings} | environment(trained.config.seed, started)
    write_json(out / "summary.json", record)
    _print(report, page)
    return 0


def _rows(tokens: np.ndarray, lead: tuple[int, ...], length: int, most: int) -> np.ndarray:
    """The text as [B, T] rows led like every training row; a remainder is dropped."""
    body = min(length - len(lead), tokens.size)
    if body < 1:
        raise ValueError(
            f"context_length: expected more than the {len(lead)} leading tokens, got {length}"
        )
    count = min(tokens.size // body, most)
    prefix = np.broadcast_to(np.asarray(lead, np.int32), (count, len(lead)))
    return np.concatenate([prefix, tokens[: count * body].reshape(count, body)], axis=1)


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")


def _print(report: Report, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "", title=report.heading, title_justify="left")
    table.columns[1].justify = "right"
    for name, value in report.scalars.items():
        table.add_row(name, number(value), report.definition(name))
    console = Console()
    if report.scalars:
        console.print(table)
    columns = report.by_layer()
    if columns:
        depth = len(next(iter(columns.values())))
        shown = sorted({round(i) for i in np.linspace(0, depth - 1, min(depth, _LAYERS))})
        table = Table("by layer", title_justify="left")
        for layer in shown:
            table.add_column(str(layer), justify="right")
        for name, values in columns.items():
            table.add_row(name, *(number(values[layer]) for layer in shown))
        console.print(table)
    console.print(f"{page}: pictures and definitions", soft_wrap=True, highlight=False)
