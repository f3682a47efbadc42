"""Bigram-Backcopy: which attention variants put an idle head's weight on BOS?

Claim. On the Bigram-Backcopy task (Guo et al. 2024, arXiv 2410.13835) a one-layer softmax model
puts most of the weight of its idle queries on BOS within 400 steps, and drains the value of BOS.
softmax1, sink logits and sigmoid with bias −ln T solve the task at equal loss without.

Command (about ten minutes on two CPU cores; `--variants` and `--seeds` choose a part):

    python experiments/backcopy.py --out runs/backcopy

Expected, for each of the seeds 0, 1 and 2: attention to BOS from non-trigger queries at least 0.6
with softmax and at most 0.1 with softmax1, sink logits and biased sigmoid; the losses of these four
within 0.03 nats per token of each other. The other variants are shown with whatever comes out. The
last line says whether all of that held; the exit status is 1 where it did not.

Results are in LOG.md.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sinkjax.cli.record import environment, write_json
from sinkjax.diagnose import capture
from sinkjax.train import VARIANTS, attention_to_bos, backcopy_run, fit, held_out_rows

FREE_OF_SINKS = ("softmax1", "sink logit", "sigmoid, bias -ln T")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train every attention variant on Bigram-Backcopy and see where idle heads look."""

    out: Path = Path("runs/backcopy")
    """Folder for the runs and summary.json."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters and rows."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants, by name."""

    steps: int = 400
    """Optimiser steps."""


def measure(variant: str, seed: int, config: Experiment) -> dict[str, float | str | int]:
    """Train one variant with one seed and measure it on rows that it has not seen.

    Returns: `attention_to_bos`, mean weight on BOS from non-trigger queries; `loss`, nats per token;
    `value_drain`, norm of BOS's value over the mean norm of the others; `row_mass`, mean sum of a
    row's weights; `sink_rate`, share of rows whose importance of BOS is above 0.3.
    """
    name = "_".join("".join(c if c.isalnum() else " " for c in variant).split())
    settings = backcopy_run(variant, config.out / f"{name}_{seed}", seed=seed, steps=config.steps)
    run = fit(settings, progress=False)
    if run.interrupted:
        raise KeyboardInterrupt
    rows = held_out_rows()
    found = capture(run.model, rows["tokens"])
    last = [row for row in run.metrics if row["split"] == "validation"][-1]
    return {
        "variant": variant,
        "seed": seed,
        "attention_to_bos": attention_to_bos(np.asarray(found.weights[0]), rows["is_trigger"] == 1),
        "row_mass": float(np.mean(found.statistics["row_mass"])),
        "loss": float(last["nll"]),
        "value_drain": float(np.mean(last["value_drain"])),
        "sink_rate": float(np.mean(last["sink_rate"])),
    }


def holds(results: list[dict]) -> bool:
    """Whether the claim holds for every seed that has all four variants."""
    fine = True
    for seed in {row["seed"] for row in results}:
        found = {row["variant"]: row for row in results if row["seed"] == seed}
        four = [found[name] for name in ("softmax", *FREE_OF_SINKS) if name in found]
        losses = [row["loss"] for row in four]
        fine &= len(four) == 4 and max(losses) - min(losses) <= 0.03
        fine &= all(
            row["attention_to_bos"] >= 0.6 if row["variant"] == "softmax"
            else row["attention_to_bos"] <= 0.1
            for row in four
        )  # fmt: skip
    return fine


def main(config: Experiment) -> int:
    """Run, print the table, write summary.json; 0 if the claim held."""
    started, console = time.perf_counter(), Console()
    results = []
    for variant in config.variants:
        for seed in config.seeds:
            results.append(measure(variant, seed, config))
            row = results[-1]
            console.print(f"{variant}, seed {seed}: {row['attention_to_bos']:.3f}", highlight=False)
    table = Table(title="Bigram-Backcopy, T = 32", title_justify="left")
    columns = {  # heading: entry; units in the docstring of `measure`
        "to BOS": "attention_to_bos",
        "loss": "loss",
        "drain": "value_drain",
        "mass": "row_mass",
        "rate": "sink_rate",
    }
    table.add_column("variant", no_wrap=True)
    for heading in ("seed", *columns):
        table.add_column(heading, justify="right")
    for row in results:
        numbers = (f"{row[name]:.3f}" for name in columns.values())
        table.add_row(row["variant"], str(row["seed"]), *numbers)
    console.print(table)
    fine = holds(results)
    write_json(
        config.out / "summary.json",
        {"claim_holds": fine, "results": results, **environment(None, started)},
    )
    print("The claim holds." if fine else "The claim does NOT hold.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Experiment)))
