"""Every attention variant of the library at equal budget: loss, sink, outliers, zeros and speed.

Claim. On Bigram-Backcopy (Guo et al. 2024, arXiv 2410.13835) idle queries of softmax rest on BOS,
and those of softmax1, sink logits and sigmoid with bias −ln T do not, at equal loss. ReLU and
ELU+1 kernels whose rows are normalised to one keep the sink.

Commands (the first about 45 minutes on two idle CPU cores, and it goes on where it was stopped; the
second about five):

    python experiments/variants.py --out runs/variants
    python experiments/variants.py --out runs/variants --cost

Two tasks. `backcopy` as in `backcopy.py`: T = 32, one layer, d = 64, one head, AdamW at 1e-2, 400
steps. `text` is the standard library's source byte by byte: T = 64, two layers, d = 64, one head,
AdamW at a constant 1e-2 with weight decay 0.3. Variants that pair heads get two heads of 32, and
"softmax, 2 heads" stands beside them. The same seeds, rows, steps and settings for all; learned sink
tokens come on top of T.

Expected, for each of the seeds 0, 1 and 2 on `backcopy`: attention to BOS from idle queries at least
0.6 with softmax, at most 0.1 with softmax1, sink logit and biased sigmoid, the losses of these four
within 0.03 nats of each other. In the mean over the seeds, at least 0.3 with the normalised ReLU and
ELU+1 kernels, where uniform attention gives 0.10. (Normalised sigmoid was expected there too and did not
hold: it is shown as it comes out.) The last lines say whether that held, and how the order of the
sink rates compares with Table 3 of the softpick paper (Zuhri et al. 2025, arXiv 2504.20966, 340M
parameters): told in words, not part of the claim. With `--cost`: one training step of each variant
of the exponential sum and of the head-wise gate takes at most 1.05 times plain softmax's. The exit
status is 1 where something did not hold.

Results are in LOG.md.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import step_cost
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from several_seeds import BLOCK, Together, measure, train

from sinkjax.cli.record import environment, write_json
from sinkjax.diagnose.plots import style
from sinkjax.models import DecoderConfig
from sinkjax.models.variants import Variant, variants
from sinkjax.train import DataConfig, OptimizerConfig, RunConfig, backcopy_run

Task = Literal["backcopy", "text"]
Group = Literal["normalizer", "gate", "bias", "norm"]

LENGTH: dict[Task, int] = {"backcopy": 32, "text": 64}
TWO_HEADS = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32}

FREE_OF_SINKS = ("softmax1", "sink logit", "sigmoid, bias -ln T")
# Least attention to BOS; uniform attention gives idle queries (H_32 - 1) / 31 = 0.10.
NORMALIZED = {"ReLU, normalized": 0.3, "ELU+1, normalized": 0.3}

# Zuhri et al. 2025, arXiv 2504.20966v4, Table 3 (340M parameters, 10k steps): sink rate in percent,
# epsilon 0.2 and 0.3.
PUBLISHED = {
    "softmax": (47.97, 34.89),
    "rectified-only": (33.08, 25.60),
    "softmax1": (24.38, 16.36),
    "sink logit": (19.34, 8.78),
    "ReLU-softmax": (8.16, 4.56),
    "gate, element-wise": (5.00, 2.00),
    "softpick": (0.02, 0.00),
    "scaled softpick": (0.01, 0.00),
}
AGREES = 0.738  # 5 % level of Spearman's correlation, two-sided, for eight variants


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train every attention variant at equal budget and measure sink, outliers and speed."""

    out: Path = Path("runs/variants")
    """Folder for one JSON per task and variant, and summary.json. Finished ones are not run again."""

    json: Path | None = None
    """Where the summary goes instead of OUT/summary.json."""

    variants: tuple[str, ...] = ()
    """Which variants, by name; none means all of the groups."""

    groups: tuple[Group, ...] = ("normalizer", "gate", "bias")
    """Which groups of variants."""

    tasks: tuple[Task, ...] = ("backcopy", "text")
    """Which tasks."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters and rows."""

    steps_backcopy: int = 400
    """Optimiser steps on backcopy."""

    steps_text: int = 250
    """Optimiser steps on text."""

    figure: Path | None = None
    """Where a picture of the results goes, besides."""

    workers: int | None = None
    """Processes, each on a core of its own; None: one per CPU core, or one if there is an accelerator."""

    cost: bool = False
    """Measure the cost of a training step instead."""

    pairs: int = 60
    """Interleaved pairs of steps of each variant, with --cost."""


# --- what is run


def table_of(task: Task) -> dict[str, Variant]:
    """Variants by name for one task; those that pair heads have two of half the size."""
    table = {}
    for name, (group, fields) in variants(LENGTH[task]).items():
        pairs = fields.get("differential") or fields.get("alibi") == "balanced"
        table[name] = Variant(group, fields | TWO_HEADS if pairs else fields)
        if name == "softmax":
            table["softmax, 2 heads"] = Variant(group, dict(TWO_HEADS))
    return table


def chosen(config: Experiment) -> list[str]:
    """Names in the order of the table.

    Raises:
      ValueError: a name that is not in the table.
    """
    table = table_of("backcopy")
    unknown = [name for name in config.variants if name not in table]
    if unknown:
        raise ValueError(f"variants: expected some of {', '.join(table)}; got {unknown}")
    wanted = config.variants or [name for name in table if table[name].group in config.groups]
    return [name for name in table if name in wanted]


def settings(task: Task, fields: dict[str, Any], steps: int) -> RunConfig:
    """The run of one variant, seed 0."""
    learned = fields.get("num_learned_sink_tokens", 0)
    if task == "backcopy":
        run = backcopy_run("softmax", "unused", steps=steps)
    else:
        run = RunConfig(
            model=DecoderConfig(
                vocab_size=257,  # bytes and BOS
                model_dim=64,
                num_layers=2,
                num_heads=1,
                num_kv_heads=1,
                head_dim=64,
                mlp_dim=176,
                context_length=LENGTH["text"],
            ),
            data=DataConfig(source="text", batch_size=16),
            optimizer=OptimizerConfig(
                learning_rate=1e-2,
                schedule="constant",
                warmup_steps=min(100, steps // 10),
                weight_decay=0.3,
            ),
            path="unused",
            steps=steps,
        )
    sizes = {
        "vocab_size": run.model.vocab_size + learned,
        "context_length": run.model.context_length + learned,
    }
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **sizes | fields))


# --- one result: one file


def file_of(out: Path, task: Task, name: str) -> Path:
    """Where the result of a variant is kept."""
    words = "".join(c if c.isalnum() else " " for c in name.replace("+", " plus ")).split()
    return out / task / f"{'_'.join(words)}.json"


def described(run: RunConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """What a result must agree in, to stand for a run of the same name."""
    return json.loads(json.dumps({"seeds": list(seeds), "run": dataclasses.asdict(run)}))


def finished(file: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, if there is one with these settings."""
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if found.get("settings") == wanted else None


def work(out: Path, task: Task, name: str, seeds: tuple[int, ...], steps: int) -> None:
    """Train and measure one variant on one task, and write its file."""
    started = time.perf_counter()
    group, fields = table_of(task)[name]
    run = settings(task, fields, steps)
    two = run.model.num_heads == 2
    params, losses, speed = train(run, seeds, _beside(task, two, seeds, steps))
    results = [
        {"seed": seed, "train_loss": losses[index, -BLOCK:].mean(), **found}
        for index, (seed, found) in enumerate(zip(seeds, measure(run, params), strict=True))
    ]
    write_json(
        file_of(out, task, name),
        {
            "task": task,
            "variant": name,
            "group": group,
            "settings": described(run, seeds),
            "relative_speed": speed,
            "results": results,
            **environment(seeds[0], started),
        },
    )


@functools.lru_cache(maxsize=4)
def _beside(task: Task, two: bool, seeds: tuple[int, ...], steps: int) -> Together:
    """Plain softmax with as many heads, to be timed; the first block of a program is a slow one."""
    together = Together(settings(task, TWO_HEADS if two else {}, steps), seeds)
    together.block(0)
    return together


def run_all(config: Experiment, console: Console) -> tuple[list[dict[str, Any]], list[str]]:
    """Results in the order of the table, and what went wrong."""
    steps: dict[Task, int] = {"backcopy": config.steps_backcopy, "text": config.steps_text}
    jobs: list[tuple[Task, str]] = [
        (task, name) for task in config.tasks for name in chosen(config)
    ]

    def result(task: Task, name: str) -> dict[str, Any] | None:
        run = settings(task, table_of(task)[name].fields, steps[task])
        return finished(file_of(config.out, task, name), described(run, config.seeds))

    missing = [job for job in jobs if result(*job) is None]
    failures = []
    with _workers(config.workers, len(missing)) as pool:
        futures = {
            pool.submit(work, config.out, task, name, config.seeds, steps[task]): (task, name)
            for task, name in missing
        }
        watched = track(
            as_completed(futures),
            description=f"{len(jobs)} runs, {len(jobs) - len(missing)} done before",
            total=len(futures),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        for future in watched:
            error = future.exception()
            if error is not None:
                failures.append(f"{': '.join(futures[future])}: {type(error).__name__}: {error}")
    return [found for job in jobs if (found := result(*job)) is not None], failures


@contextlib.contextmanager
def _workers(count: int | None, jobs: int) -> Iterator[Executor]:
    if count is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        count = cores if jax.default_backend() == "cpu" else 1
    count = min(count, jobs)
    if count <= 1:
        yield Here()
        return
    # A fresh process each: a fork of one that has started jax hangs.
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    pool = ProcessPoolExecutor(count, context, initializer=_settle, initargs=(numbers,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _settle(numbers: Any) -> None:
    """One core for this process, so that speeds compare, before jax counts them; Ctrl-C ends it."""
    # At once and without a word: what is written is whole, and the first process has the last word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[numbers.get() % len(cores)]})


class Here(Executor):
    """Runs what it is given at once, in this process; Ctrl-C goes through."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # kept for the report, as a pool does
            future.set_exception(error)
        return future


# --- what came out


def mean(found: dict[str, Any], entry: str) -> float:
    """Over the seeds; NaN where a number is missing or was not finite."""
    values = [row.get(entry) for row in found["results"]]
    return float("nan") if None in values else statistics.fmean(values)


def holds(results: list[dict[str, Any]]) -> list[str]:
    """What of the claim does not hold; empty if all does."""
    found = {one["variant"]: one for one in results if one["task"] == "backcopy"}
    lacking = [n for n in ("softmax", *FREE_OF_SINKS, *NORMALIZED) if n not in found]
    if lacking:
        return [f"not run on backcopy: {', '.join(lacking)}"]
    wrong = []
    for index, softmax in enumerate(found["softmax"]["results"]):
        four = {name: found[name]["results"][index] for name in ("softmax", *FREE_OF_SINKS)}
        if not all(_finite(row, "to_bos") and _finite(row, "loss") for row in four.values()):
            wrong.append(f"seed {softmax['seed']}: a number is not finite")
            continue
        if softmax["to_bos"] < 0.6:
            wrong.append(f"seed {softmax['seed']}: softmax gives BOS {softmax['to_bos']:.3f}")
        for name in FREE_OF_SINKS:
            if four[name]["to_bos"] > 0.1:
                to_bos = four[name]["to_bos"]
                wrong.append(f"seed {softmax['seed']}: {name} gives BOS {to_bos:.3f}")
        losses = [row["loss"] for row in four.values()]
        if max(losses) - min(losses) > 0.03:
            wrong.append(
                f"seed {softmax['seed']}: losses from {min(losses):.3f} to {max(losses):.3f}"
            )
    for name, least in NORMALIZED.items():
        to_bos = mean(found[name], "to_bos")
        if not to_bos >= least:
            wrong.append(f"{name} gives BOS {to_bos:.3f} in the mean")
    return wrong


def _finite(row: dict[str, Any], entry: str) -> bool:
    return row.get(entry) is not None and bool(np.isfinite(row[entry]))


def order(results: list[dict[str, Any]], task: Task) -> list[str]:
    """In words: sink rates on one task beside Table 3 of the softpick paper."""
    found = {one["variant"]: one for one in results if one["task"] == task}
    names = [name for name in PUBLISHED if name in found]
    if len(names) < len(PUBLISHED):
        return [f"{task}: too few of the variants of the softpick paper's Table 3 to compare."]
    lines = []
    entries = (("sink_rate_0.2", 0), ("sink_rate_0.3", 1), ("importance", 0))
    for entry, column in entries:
        here = {name: mean(found[name], entry) for name in names}
        there = {name: PUBLISHED[name][column] for name in names}
        ranking = ", ".join(f"{n} {here[n]:.3f}" for n in sorted(names, key=lambda n: -here[n]))
        rho = spearman(list(here.values()), list(there.values()))
        if rho is None:
            verdict = "all alike here: nothing to compare"
        else:
            word = "agrees with" if rho >= AGREES else "does not agree with"
            verdict = f"{word} Table 3 (rank correlation {rho:.2f})"
        lines.append(f"{task}, {entry.replace('_', ' ')}: {ranking}; {verdict}.")
    return lines


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None if one side is constant or not finite."""
    ranks = [np.asarray(jax.scipy.stats.rankdata(jnp.asarray(side))) for side in (a, b)]
    if not np.isfinite([*a, *b]).all() or min(map(np.ptp, ranks)) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


# heading: (entry, what it is multiplied by, digits)
COLUMNS = {
    "loss": ("loss", 1, 3),
    "to BOS": ("to_bos", 1, 2),
    "rate .2": ("sink_rate_0.2", 100, 0),
    "norm.": ("sink_rate_0.2_normalized", 100, 0),
    "rate .3": ("sink_rate_0.3", 100, 0),
    "norm. ": ("sink_rate_0.3_normalized", 100, 0),
    "α₁": ("importance", 1, 3),
    "drain": ("value_drain", 1, 2),
    "p_sink": ("sink_mass", 1, 2),
    "zeros": ("zeros", 100, 1),
    "kurt.": ("kurtosis", 1, 1),
    "max": ("max_activation", 1, 1),
}


def table(results: list[dict[str, Any]], task: Task) -> Table:
    """Means over the seeds, a section per group; rates and zeros in percent."""
    shown = Table(title=f"{task}, T = {LENGTH[task]}", title_justify="left", box=None)
    shown.add_column("variant", no_wrap=True)
    for heading in (*COLUMNS, "speed"):
        shown.add_column(heading, justify="right", no_wrap=True)
    group = ""
    for found in results:
        if found["task"] != task:
            continue
        if found["group"] != group:
            group = found["group"]
            shown.add_row(f"[bold]{group}[/bold]")
        cells = []
        for entry, factor, digits in COLUMNS.values():
            value = factor * mean(found, entry)
            # No sink beside the keys is no number; neither is attention to BOS on text.
            missing = not np.isfinite(value) or (entry == "sink_mass" and value == 0)
            cells.append("–" if missing else f"{value:.{digits}f}")
        two = found["settings"]["run"]["model"]["num_heads"] == 2
        mark = " ²" if two else ""
        shown.add_row(found["variant"] + mark, *cells, f"{found['relative_speed']:.2f}")
    return shown


def figure(results: list[dict[str, Any]]) -> Figure:
    """A row per variant, a dot per seed: sink and loss on both tasks; the bar is softmax's mean."""
    panels: list[tuple[Task, str, str, tuple[float, float]]] = [
        ("backcopy", "to_bos", "idle attention to BOS", (0, 1)),
        ("backcopy", "loss", "loss, nats", (3.2, 3.3)),
        ("text", "importance", "attention to BOS", (0, 0.3)),
        ("text", "loss", "loss, nats", (1.8, 2.6)),
    ]
    names = list(dict.fromkeys(one["variant"] for one in results))
    groups = list(dict.fromkeys(one["group"] for one in results))
    colours = dict(zip(groups, style.CYCLE, strict=False))
    shown = style.new_figure(11, 1.7 + 0.19 * len(names))
    for axes, (task, entry, label, (low, high)) in zip(
        np.atleast_1d(shown.subplots(1, len(panels), sharey=True)), panels, strict=True
    ):
        style.dress(axes, title=task, x=label)
        for one in results:
            if one["task"] != task:
                continue
            values = [row[entry] for row in one["results"] if _finite(row, entry)]
            place = names.index(one["variant"])
            for marker, some in (
                ("o", [x for x in values if low <= x <= high]),
                (">", [high for x in values if x > high]),
                ("<", [low for x in values if x < low]),
            ):
                colour = colours[one["group"]]
                axes.scatter(some, [place] * len(some), s=14, marker=marker, color=colour)
            if one["variant"] == "softmax" and values:
                axes.axvline(statistics.fmean(values), color=style.GREY, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    note = "Each dot is a seed, a triangle one beyond the edge; the line is plain softmax."
    style.headline(shown, "Attention variants at equal budget", note)
    return shown


# --- the commands


def report_cost(config: Experiment, console: Console) -> int:
    """Ratios of every costed variant, and softmax against itself; 1 if one is above the limit."""
    started = time.perf_counter()
    wanted = [
        name for name in step_cost.VARIANTS if name in (config.variants or step_cost.VARIANTS)
    ]
    softmax = step_cost.Step(step_cost.model({}))
    rows = []
    shown = Table(title="One training step over softmax's, D = T = 256", title_justify="left")
    for heading in ("variant", "median", "95 %", "quartiles", "softmax, ms"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    names = track(
        ("softmax", *wanted), console=console, transient=True, disable=not console.is_terminal
    )
    for name in names:
        row = step_cost.measure(name, config.pairs, softmax)
        rows.append(row)
        shown.add_row(
            name if name != "softmax" else "softmax again",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            "{:.3f} to {:.3f}".format(*row["quartiles"]),
            f"{row['milliseconds']:.0f}",
        )
    console.print(shown)
    above = [row["variant"] for row in rows[1:] if row["ratio"] > step_cost.LIMIT]
    write_json(
        config.json or config.out / "cost.json",
        {"limit": step_cost.LIMIT, "above": above, "results": rows, **environment(0, started)},
    )
    print(f"Above {step_cost.LIMIT}: {', '.join(above) or 'none'}.")
    return 1 if above else 0


def main(config: Experiment) -> int:
    """Run, print the tables, write the summary; 0 if the claim held."""
    started, console = time.perf_counter(), Console()
    if config.cost:
        return report_cost(config, console)
    results, failures = run_all(config, console)
    wide = Console(width=max(console.width, 140))
    for task in config.tasks:
        wide.print(table(results, task))
    print(
        "Means over the seeds; rates and exact zeros in percent; ²: two heads of 32. Kurtosis and"
    )
    print("maximum are those of the residual stream after each half of each block.")
    wrong = holds(results)
    words = [line for task in config.tasks for line in order(results, task)]
    for line in (*words, *failures, *wrong):
        print(line)
    if config.figure is not None:
        config.figure.parent.mkdir(parents=True, exist_ok=True)
        figure(results).savefig(config.figure, dpi=150)
    write_json(
        config.json or config.out / "summary.json",
        {
            "claim_holds": not wrong,
            "wrong": wrong,
            "failures": failures,
            "order": words,
            "results": results,
            **environment(config.seeds[0], started),
        },
    )
    print("The claim does NOT hold." if wrong else "The claim holds.")
    return 1 if wrong or failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Experiment)))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
