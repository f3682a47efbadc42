"""What a smaller cache costs: loss past the cache by sinks, policies and bits."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinkjax.diagnose.plots import style

_TITLES = {
    "sinks": "number of sink tokens",
    "policy": "which tokens stay",
    "bits": "bits of keys and values",
}


def of_caches(rows: Sequence[Mapping[str, Any]], *, title: str = "What a cache costs") -> Figure:
    """Nats per token past the cache, a panel for each thing that is varied.

    Args:
        rows: each with "group" (sinks, policy or bits), "label", "nll_beyond" and "cache_bytes".
        title: of the figure.
    Returns:
        The figure.
    Raises:
        ValueError: no rows, or a row of another group.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    unknown = [group for group in groups if group not in _TITLES]
    if unknown or not groups:
        raise ValueError(f"rows: expected groups {', '.join(_TITLES)}, got {unknown or 'none'}")
    most = max(sum(row["group"] == group for row in rows) for group in groups)
    figure = style.new_figure(4.4 * len(groups), 1.5 + 0.27 * most)
    best = min(row["nll_beyond"] for row in rows)
    worst = max(row["nll_beyond"] for row in rows)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, group, colour in zip(panels, groups, style.CYCLE, strict=False):
        _bars(panel, [row for row in rows if row["group"] == group], colour, best, worst)
        style.dress(panel, title=_TITLES[group], x="nats per token past the cache")
        panel.grid(False, axis="y")
    style.headline(
        figure, title, "Shorter is better; beside each bar the memory of the cache in bytes."
    )
    return figure


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str, best: float, worst: float):
    room = max(worst - best, 0.02 * abs(best), 1e-6)
    values = [row["nll_beyond"] for row in rows]
    axes.barh(range(len(rows)), values, color=colour, height=0.7)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    # Differences are small beside the loss: bars start a little before the best of all.
    axes.set_xlim(best - 0.25 * room, worst + 0.55 * room)
    for place, row in enumerate(rows):
        text = f"{row['nll_beyond']:.3f}  {row['cache_bytes']:,}"
        axes.annotate(
            text,
            (row["nll_beyond"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.NOTE,
            color=style.GREY,
        )
