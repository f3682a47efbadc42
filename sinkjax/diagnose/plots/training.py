"""Pictures over training steps, from the rows of a run's metrics.jsonl."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sinkjax.diagnose.plots import style


@dataclasses.dataclass(frozen=True)
class Panel:
    """How one measurement is drawn; an array [L, ...] per step is reduced to a curve per layer."""

    title: str
    unit: str = ""
    reduce: Callable[..., np.ndarray] = np.mean


# Names as the training loop writes them at evaluation steps.
PANELS: dict[str, Panel] = {
    "nll": Panel("validation loss", "nats per token"),
    "loss": Panel("training loss", "nats per token"),
    "sink_rate": Panel("sink rate: α₁ > ε", "fraction of heads"),
    "importance": Panel("importance α₁ (largest head)", "mean weight on token 0", np.max),
    "first_token_share": Panel("attention on the first token", "share"),
    "value_drain": Panel("value-norm drain ‖v₀‖ / mean ‖v‖", "ratio"),
    "entropy": Panel("attention entropy", "nats"),
    "residual_peak": Panel("residual peak ‖h₀‖ / mean ‖h‖", "ratio", np.max),
}
_DEFAULT = ("nll", "sink_rate", "importance", "first_token_share", "value_drain")


def over_steps(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    *,
    split: str = "validation",
    baselines: Mapping[str, float] | None = None,
    title: str = "How the sink forms",
) -> Figure:
    """Curves of loss, sink and drain over training steps, one panel per column.

    Args:
        rows: measurements in any order, each with "step" and some columns; rows that lack a
            column are left out of its panel. A list of numbers is one curve per layer.
        columns: column in the rows -> key of `PANELS` or a free title. By default loss, sink rate,
            importance, first-token share and value drain, as far as some row has them.
        split: rows that name another one, such as "train", are left out.
        baselines: key of `PANELS` -> a dashed horizontal line, such as uniform attention.
        title: of the figure.
    Returns:
        The figure.
    Raises:
        ValueError: no row has any of the columns.
    """
    rows = [row for row in rows if row.get("split", split) == split]
    if columns is None:
        columns = {name: name for name in _DEFAULT if any(name in row for row in rows)}
    panels = {column: PANELS.get(key, Panel(key)) for column, key in columns.items()}
    data = {column: _series(rows, column, panels[column]) for column in columns}
    data = {column: series for column, series in data.items() if len(series[0])}
    if not data:
        raise ValueError(
            f"rows: expected some with 'step' and one of {list(columns or _DEFAULT)}, "
            f"got {len(rows)} rows with {sorted({key for row in rows for key in row})}"
        )
    count = len(data)
    across = 2 if count == 4 else min(count, 3)
    down = -(-count // across)
    figure = style.new_figure(max(3.5 * across, 5.6), 0.8 + 2.9 * down)
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes, (column, (steps, values)) in zip(grid, data.items(), strict=False):
        key = columns[column]
        several = values.shape[1] > 1
        for layer in range(values.shape[1]):
            axes.plot(
                steps, values[:, layer], color=style.CYCLE[layer % len(style.CYCLE)],
                linewidth=1.8, marker="o" if len(steps) <= 25 else None, markersize=3.5,
                label=f"layer {layer}" if several else None,
            )  # fmt: skip
        line = (baselines or {}).get(key)
        if line is not None:
            axes.axhline(line, linestyle="--", color=style.GREY, linewidth=1.2)
            axes.annotate(
                "uniform", (1.0, line), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", fontsize=style.NOTE, color=style.GREY,
            )  # fmt: skip
        style.dress(axes, title=panels[column].title, x="step", y=panels[column].unit)
        if key not in ("nll", "loss"):
            axes.set_ylim(bottom=0)
        if several and values.shape[1] <= 8:
            style.legend(axes)
    style.headline(figure, title)
    return figure


def _series(
    rows: Sequence[Mapping[str, Any]], column: str, panel: Panel
) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n, curves] of the rows that have the column, sorted by step."""
    found = {}
    for row in rows:
        if "step" in row and row.get(column) is not None:
            value = np.atleast_1d(np.asarray(row[column], np.float64))
            found[row["step"]] = panel.reduce(value.reshape(len(value), -1), axis=1)
    if not found:
        return np.zeros(0), np.zeros((0, 1))
    steps = sorted(found)
    return np.array(steps), np.stack([found[step] for step in steps])
