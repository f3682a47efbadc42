"""The look that all figures share: sizes, colours, labels. No pyplot, so no global state."""

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#6B7280",
)
CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY)
INK = "#1F2937"
HIDDEN = "#E5E7EB"  # the part of an attention map that no query can see
MAP = "magma"  # perceptually uniform, dark to bright

TITLE, LABEL, TICK, NOTE = 12.0, 10.5, 9.0, 8.5  # points

_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # pyright: ignore
    return figure


def headline(figure: Figure, title: str, note: str | None = None) -> None:
    """Title of a figure, and below it in grey what is shown; the last thing done to a figure.

    The strip is measured in inches, so that it looks the same on figures of every height, and the
    note is wrapped to the figure's width.
    """
    width, height = figure.get_size_inches()
    lines = [] if note is None else textwrap.wrap(note, int((width - 0.4) * 72 / (NOTE * 0.56)))
    top = 0.12
    _write(figure, top, title, fontsize=TITLE, color=INK, fontweight="bold")
    top += TITLE * 1.45 / 72
    for line in lines:
        _write(figure, top, line, fontsize=NOTE, color=GREY)
        top += NOTE * 1.35 / 72
    # An unseen title of the same height: the layout keeps clear of it (a smaller layout rectangle
    # would shift axes of fixed aspect out of the figure, matplotlib 3.10).
    rows = 1 + len(lines)
    figure.suptitle("\n".join("M" * rows), fontsize=top * 72 / (1.25 * rows), alpha=0)
    # The first layout of axes of fixed aspect is not the last one and cuts off labels; the caller
    # draws again when saving, and finds it settled.
    figure.draw_without_rendering()


def _write(figure: Figure, inches_from_top: float, text: str, **options: Any) -> None:
    width, height = figure.get_size_inches()
    y = 1 - inches_from_top / height
    figure.text(0.16 / width, y, text, ha="left", va="top", parse_math=False, **options)


def dress(axes: Axes, *, title: str | None = None, x: str = "", y: str = "") -> Axes:
    """Axis labels, a light grid behind the data, no box."""
    if title is not None:
        axes.set_title(title, fontsize=LABEL, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=LABEL, color=INK)
    axes.set_ylabel(y, fontsize=LABEL, color=INK)
    axes.tick_params(labelsize=TICK, colors=INK, length=3, width=0.6)
    axes.grid(True, color="#E5E7EB", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9CA3AF")
    return axes


def legend(axes: Axes, **options: Any) -> None:
    """A frameless legend."""
    axes.legend(fontsize=TICK, frameon=False, labelcolor=INK, **options)


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Token texts that can stand on an axis.

    White space becomes a visible sign, and what the bundled font may not have (it covers Latin,
    Greek and Cyrillic) becomes an escape, since a missing glyph is an empty box and a warning.
    """
    return ["".join(_visible(character) for character in text) or "∅" for text in tokens]


def _visible(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if not character.isprintable() or ord(character) >= 0x500:
        return character.encode("unicode_escape").decode("ascii")
    return character


def whole_ticks(axes: Axes, x: bool = True) -> None:
    """Integer ticks for axes that count layers, heads or positions, be it a single one."""
    locator = MaxNLocator(integer=True, min_n_ticks=1)
    (axes.xaxis if x else axes.yaxis).set_major_locator(locator)
