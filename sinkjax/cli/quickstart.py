"""`sinkjax quickstart`: watch a sink form, vanish, and keep an endless stream alive."""

import dataclasses
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sinkjax.cache import SinkWindow
from sinkjax.cli.record import environment, peak_memory_bytes, write_json
from sinkjax.diagnose import Report, Section, analyze, capture, plots, write_report
from sinkjax.diagnose.page import png
from sinkjax.files import write_whole
from sinkjax.models import preset
from sinkjax.ops.statistics import uniform_importance
from sinkjax.stream import Sampler, evaluate, generate
from sinkjax.train import (
    ByteTokenizer,
    DataConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    attention_to_bos,
    backcopy_run,
    fit,
    held_out_rows,
    load_data,
)

SHOWN = ("softmax", "softmax1", "sink logit", "sigmoid, bias -ln T", "gate, element-wise")
"""Variants of the first part; `experiments/backcopy.py` has all of them."""

SINK_TOKENS = 4  # Xiao et al. 2023, table 2: more than four bring nothing


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Watch a sink form, remove it, stream past the context: three minutes, two cores."""

    out: Path = Path("runs/quickstart")
    """Folder for runs, figures, report.html and summary.json."""

    seed: int = 0
    """Seed of parameters, data order and sampler."""

    steps: int = 400
    """Optimiser steps of each toy model."""

    text_steps: int = 2000
    """Optimiser steps of the byte-level model."""

    stream_tokens: int = 20_000
    """Tokens to generate past the context."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("text_steps", 1), ("stream_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def run(config: Quickstart) -> int:
    """Run all parts; returns the exit status."""
    started = time.perf_counter()
    console = Console(soft_wrap=not sys.stdout.isatty())
    config.out.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress, _thread() as (submit, stop):
        # Small programs leave half of two cores idle, and compilation all but one: the toy task
        # and the text model are trained side by side.
        comparison = submit(_compare_variants, config, progress, stop)
        model_run = _train_on_text(config, progress)
        rows = _held_out_text(model_run.config)
        policies = _compare_policies(model_run, rows, progress)
        stream = _stream(config, model_run, progress)
        report = analyze(model_run.model, rows[:32])
        variants, maps = comparison.result()
    summary = {
        "variants": variants,
        "text": _sink_of_run(model_run, report),
        "policies": policies,
        "stream": {name: x for name, x in stream.items() if name != "text"},
    }
    _write(config, summary, maps, model_run, report, rows, stream["text"])
    summary |= environment(config.seed, started)
    write_json(config.out / "summary.json", summary)
    _print(console, config, summary)
    return 0


@contextmanager
def _thread() -> Iterator[tuple[Callable[..., Future], threading.Event]]:
    """One thread for a run beside the main one; whatever ends the block early ends it, saved."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit, stop
        except BaseException:
            stop.set()
            raise


def _compare_variants(
    config: Quickstart, progress: Progress, stop: threading.Event
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """Train the toy task under each variant; where idle heads look, and one attention map each."""
    task = progress.add_task("Backcopy: train five attention variants", total=len(SHOWN))
    rows = held_out_rows()
    found, maps = {}, {}
    for name in SHOWN:
        folder = config.out / "backcopy" / _slug(name)
        settings = backcopy_run(name, folder, seed=config.seed, steps=config.steps)
        trained = _fit(settings, stop)
        weights = np.asarray(capture(trained.model, rows["tokens"]).weights[0])
        last = _validation(trained)[-1]
        found[name] = {
            "attention_to_bos": attention_to_bos(weights, rows["is_trigger"] == 1),
            "loss": float(last["nll"]),
            "value_drain": float(np.mean(last["value_drain"])),
        }
        maps[name] = weights[0, 0]
        progress.advance(task)
    return found, maps


def _train_on_text(config: Quickstart, progress: Progress) -> Run:
    """A byte-level model on the source of Python's standard library, every row led by BOS."""
    task = progress.add_task("Text: train a byte-level model", total=1)
    trained = _fit(
        RunConfig(
            model=preset("tiny"),
            data=DataConfig(batch_size=16, seed=config.seed),
            # High rate, strong decay of everything: at this size the settings under which a sink
            # shows within a minute (Gu et al. 2024 find both drivers at 60M parameters).
            optimizer=OptimizerConfig(
                learning_rate=1e-2, weight_decay=0.3, no_decay=(), schedule="constant"
            ),
            path=str(config.out / "text"),
            steps=config.text_steps,
            seed=config.seed,
            eval_every=max(config.text_steps // 20, 1),
            eval_batches=4,
            checkpoint_every=max(config.text_steps // 2, 1),
        )
    )
    progress.advance(task)
    return trained


def _fit(config: RunConfig, stop: threading.Event | None = None) -> Run:
    """Train without a bar of its own; Ctrl-C has saved the run, and ends the whole command."""
    trained = fit(config, progress=False, stop=stop)
    if trained.interrupted:
        raise KeyboardInterrupt
    return trained


def _held_out_text(config: RunConfig, batches: int = 24) -> np.ndarray:
    """[B, T] rows of validation text that hold one document each, BOS first."""
    shape = config.model
    _, validation = load_data(config.data, shape.context_length, shape.vocab_size)
    found = [validation[i] for i in range(batches)]
    tokens = np.concatenate([batch["tokens"] for batch in found])
    whole = np.concatenate([(batch["segment_ids"] == 1).all(axis=1) for batch in found])
    return tokens[whole]


def _compare_policies(run: Run, rows: np.ndarray, progress: Progress) -> dict[str, dict[str, Any]]:
    """Loss along held-out text for recomputation, window only and sink + window."""
    task = progress.add_task("Stream: loss far past the context, three policies", total=1)
    slots = run.config.model.context_length
    text = rows[:, 1:].reshape(-1)[: 64 * slots]
    found = evaluate(
        run.model,
        text,
        num_sink_tokens=SINK_TOKENS,
        window=slots - SINK_TOKENS,
        lead=(ByteTokenizer().bos_id,),
        chunk_size=slots,
        every=4,
        batch_size=64,
    )
    progress.advance(task)
    return {name: result.summary(beyond=slots) for name, result in found.items()}


def _stream(config: Quickstart, run: Run, progress: Progress) -> dict[str, Any]:
    """Generate far past the context on a cache of constant size."""
    task = progress.add_task("Stream: generate without end", total=config.stream_tokens)
    slots = run.config.model.context_length
    events = generate(
        run.model,
        "def ",
        cache=SinkWindow(SINK_TOKENS, slots - SINK_TOKENS),
        sampler=Sampler(temperature=0.8),
        seed=config.seed,
        max_new_tokens=config.stream_tokens,
        tokenizer=ByteTokenizer(),
    )
    text, logprobs, sizes, early = [], [], set(), 0
    first = event = next(events)
    for count, event in enumerate(events, start=2):
        text.append(event.text)
        logprobs.append(event.logprob)
        sizes.add(event.statistics.cache_bytes)
        if count == min(1000, config.stream_tokens):
            early = peak_memory_bytes()
        if count % 500 == 0:
            progress.update(task, completed=count)
    progress.update(task, completed=config.stream_tokens)
    return {
        "tokens": len(logprobs) + 1,
        "context_length": slots,
        "evicted": event.statistics.evicted,
        "cache_slots": event.statistics.cache_slots,
        "cache_bytes": first.statistics.cache_bytes,
        "cache_bytes_constant": sizes <= {first.statistics.cache_bytes},
        "memory_growth_bytes": peak_memory_bytes() - early if early else 0,
        "nll": -float(np.mean(logprobs)) if logprobs else -first.logprob,
        "text": "".join(text),
    }


def _sink_of_run(run: Run, report: Report) -> dict[str, float]:
    """The curve of the text model, reduced to the numbers of the table."""
    validation = _validation(run)
    first, last = validation[0], validation[-1]
    return {
        "steps": run.step,
        "loss": float(last["nll"]),
        "importance_at_start": float(np.max(first["importance"])),
        "importance": float(np.max(last["importance"])),
        "importance_highest": max(float(np.max(row["importance"])) for row in validation),
        "uniform_importance": uniform_importance(run.config.model.context_length),
        "value_drain_at_start": float(np.min(first["value_drain"])),
        "value_drain": float(np.min(last["value_drain"])),
        "sink_rate": float(report["sink_rate"]),
    }


def _write(
    config: Quickstart,
    summary: dict[str, Any],
    maps: dict[str, np.ndarray],
    model_run: Run,
    report: Report,
    rows: np.ndarray,
    text: str,
) -> None:
    """Figures and report.html."""
    symbols = ["BOS", *(SYMBOLS[token] for token in held_out_rows(1)["tokens"][0, 1:])]
    what = plots.what_a_sink_is(
        maps["softmax"],
        maps["softmax1"],
        symbols,
        note="After 1, 2 or 3 the task is to copy the token before; elsewhere the head has nothing "
        "to do. A softmax row must sum to 1, so it rests on BOS; softmax1 may rest nowhere.",
    )
    variants = plots.sink_variants(summary["variants"])
    curves = plots.over_steps(
        model_run.metrics,
        {"nll": "nll", "importance": "importance", "value_drain": "value_drain"},
        baselines={"importance": summary["text"]["uniform_importance"]},
        title="A sink forms while the byte-level model trains",
    )
    tokenizer = ByteTokenizer()
    labels = ["BOS", *(tokenizer.decode([int(t)]) for t in rows[0, 1:])]
    weights = np.asarray(capture(model_run.model, rows[:1]).weights[:, 0])
    figures = plots.of_report(report, weights, labels)
    folder = config.out / "figures"
    named = {"what_a_sink_is": what, "sink_variants": variants, "sink_over_steps": curves}
    for name, figure in (named | {_slug(c): f for c, f in figures.items()}).items():
        write_whole(folder / f"{name}.png", png(figure))
    stream = summary["stream"]
    sections = [
        Section(
            "What a sink is",
            "Two one-layer models, trained alike on a task in which a head has work to do at three "
            "of 64 symbols only. Softmax weights must sum to one: where there is nothing to do, the "
            "head rests on BOS, and the value of BOS shrinks. With softmax1 the head may attend to "
            "nothing.",
            figures={"Attention weights of one held-out row": what},
        ),
        Section(
            "Removing it",
            "Mean attention to BOS from queries that have nothing to copy, and the validation loss.",
            table=_variant_rows(summary),
            figures={"The same, drawn": variants},
        ),
        Section(
            "How it forms on real text",
            "A byte-level model on the source of Python's standard library; every row starts with "
            "BOS. The dashed line is uniform attention. At this size the mean attention to BOS and "
            "the drain of its value tell the story; the rate above a threshold of 0.3 does not.",
            table=[summary["text"]],
            figures={"Validation loss, importance of BOS, value-norm drain": curves},
        ),
        Section(
            "Streaming past the context",
            f"{stream['tokens']:,} tokens generated on {stream['cache_slots']} cache slots "
            f"({stream['cache_bytes']:,} bytes throughout), {stream['evicted']:,} evicted. "
            "The table is the loss on held-out text, in nats per token; `nll_beyond` counts the "
            f"tokens past the context of {stream['context_length']} only.",
            table=list(summary["policies"].values()),
        ),
        Section("The end of the stream", text[-600:]),
    ]
    write_report(report, figures, config.out / "report.html", sections, title="sinkjax quickstart")


def _variant_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "variant": name,
            "attention to BOS": numbers["attention_to_bos"],
            "loss (nats/token)": numbers["loss"],
            "value drain": numbers["value_drain"],
        }
        for name, numbers in summary["variants"].items()
    ]


def _print(console: Console, config: Quickstart, summary: dict[str, Any]) -> None:
    """The table on the terminal, and where to go from here."""
    table = Table(title="Bigram-Backcopy: where does an idle head look?", title_justify="left")
    table.add_column("attention")
    for heading in ("attention to BOS", "loss, nats", "value drain"):
        table.add_column(heading, justify="right")
    for name, x in summary["variants"].items():
        table.add_row(
            name, f"{x['attention_to_bos']:.3f}", f"{x['loss']:.3f}", f"{x['value_drain']:.2f}"
        )
    console.print(table)
    text = summary["text"]
    console.print(
        f"Text model, {text['steps']} steps: mean attention to BOS {text['importance_at_start']:.2f} "
        f"→ {text['importance']:.2f} (uniform {text['uniform_importance']:.2f}), "
        f"value drain {text['value_drain_at_start']:.2f} → {text['value_drain']:.2f}, "
        f"loss {text['loss']:.2f} nats per byte."
    )
    slots = summary["stream"]["cache_slots"]
    table = Table(title=f"Held-out text past the context, at most {slots} tokens in view",
                  title_justify="left")  # fmt: skip
    for heading in ("policy", "loss, nats", "past the context", "cache, bytes"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, x in summary["policies"].items():
        table.add_row(name, f"{x['nll']:.3f}", f"{x['nll_beyond']:.3f}", f"{x['cache_bytes']:,}")
    console.print(table)
    stream = summary["stream"]
    console.print(
        f"Stream: {stream['tokens']:,} tokens generated, {stream['evicted']:,} evicted, "
        f"{stream['cache_bytes']:,} bytes of cache throughout."
    )
    console.print(
        f"{summary['seconds']:.0f} s, {summary['peak_memory_bytes'] / 2**20:,.0f} MiB at most. "
        f"Pictures: {config.out / 'report.html'}   Numbers: {config.out / 'summary.json'}\n\n"
        "Try next:\n" + "\n".join(f"  {line}" for line in next_commands(config)),
        highlight=False,
        markup=False,
    )


def next_commands(config: Quickstart) -> list[str]:
    """Three command lines that go on from here."""
    text = shlex.quote(str(config.out / "text"))
    return [
        f"sinkjax generate {text} 'class ' --max-new-tokens 500",
        f"sinkjax analyze {text} --out runs/analysis",
        "sinkjax train --preset tiny --model.normalizer softmax1 --out runs/softmax1",
    ]


def _validation(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.metrics if row["split"] == "validation"]


def _slug(name: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "_".join(words)


SYMBOLS = "123ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+-*/=<>&%"
"""The 64 symbols of the toy task for the eye; the first three are the triggers."""


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Progress bars on a terminal, silence elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stdout.isatty()) as progress:
        yield progress
