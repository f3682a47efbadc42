"""Pictures of attention: maps of single heads, and the picture that shows what a sink is."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from sinkjax.diagnose.plots import style

_WHY = (
    "One head of each of two models trained on the same task to the same loss. A softmax row must "
    "sum to 1, so a head with nothing to say parks its weight on BOS; softmax1 may put it nowhere."
)
_LABELLED = 48  # tokens that still get a label of their own on an axis


def attention_maps(
    weights: Float[Array | np.ndarray, "L N T S"],
    tokens: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    title: str = "Attention maps",
) -> Figure:
    """Heat maps of attention weights, one row per layer and one column per head.

    Args:
        weights: one sample's weights; a key that a query cannot see has weight 0.
        tokens: text of each token, for the axes of maps with at most 48 tokens.
        layers, heads: which to show; by default at most 4 x 4, evenly spread.
        title: of the figure.
    Returns:
        The figure; the colour scale is a square root and common to all maps.
    """
    weights = np.asarray(weights, np.float32)
    layers = _spread(weights.shape[0]) if layers is None else layers
    heads = _spread(weights.shape[1]) if heads is None else heads
    rows, columns = len(layers), len(heads)
    side = 4.6 if rows * columns == 1 else 2.6
    figure = style.new_figure(max(side * columns + 0.9, 5.2), side * rows + 0.9)
    grid = figure.subplots(rows, columns, squeeze=False)
    top = max(float(np.abs(weights).max()), 1e-6)
    image = None
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = grid[row, column]
            image = _draw_map(axes, weights[layer, head], top)
            axes.set_title(f"layer {layer}, head {head}", fontsize=style.TICK, color=style.INK)
            label = tokens if rows * columns == 1 else None
            _token_axes(axes, weights.shape[-1], label, x=row == rows - 1, y=column == 0, size=side)
    bar = figure.colorbar(image, ax=grid, shrink=0.85, pad=0.02)  # pyright: ignore
    bar.set_label("attention weight (square-root scale)", fontsize=style.TICK, color=style.INK)
    bar.ax.tick_params(labelsize=style.TICK, colors=style.INK)
    style.headline(figure, title, "row = query, column = key; grey = later than the query")
    return figure


def what_a_sink_is(
    with_sink: Float[Array | np.ndarray, "T T"],
    without_sink: Float[Array | np.ndarray, "T T"],
    tokens: Sequence[str],
    *,
    names: tuple[str, str] = ("softmax", "softmax1"),
    note: str = _WHY,
) -> Figure:
    """Two attention maps side by side: a model with a sink on BOS, and one that needs none.

    Args:
        with_sink, without_sink: weights of one head of each model on the same tokens.
        tokens: text of each token; the first is BOS.
        names: of the two models' normalisers. note: the line below the title.
    Returns:
        The figure; below each map its mean weight on BOS over all later queries.
    """
    pair = [np.asarray(with_sink, np.float32), np.asarray(without_sink, np.float32)]
    figure = style.new_figure(9.6, 5.4)
    grid = figure.subplots(1, 2, squeeze=False)[0]
    image = None
    for axes, weights, name in zip(grid, pair, names, strict=True):
        image = _draw_map(axes, weights, 1.0)
        _token_axes(axes, weights.shape[-1], tokens, x=True, y=True, size=4.3)
        share = float(weights[1:, 0].mean())
        axes.set_title(
            f"{name}: {share:.0%} of attention on BOS",
            fontsize=style.LABEL,
            color=style.INK,
            loc="left",
            fontweight="bold",
        )
        axes.set_xlabel("key (token attended to)", fontsize=style.LABEL, color=style.INK)
    grid[0].set_ylabel("query (token that attends)", fontsize=style.LABEL, color=style.INK)
    length = len(pair[0])
    row = 1 + int(pair[0][1 : max(length // 6, 2), 0].argmax())  # high up: little dark to cross
    grid[0].annotate(
        "the sink: idle queries look at BOS",
        xy=(0.55, row),
        xytext=(max(0.25 * length, row + 2), row),
        fontsize=style.LABEL,
        color=style.INK,
        arrowprops={"arrowstyle": "-|>", "color": style.INK, "linewidth": 1.3},
        va="center",
    )
    bar = figure.colorbar(image, ax=list(grid), shrink=0.8, pad=0.015)  # pyright: ignore
    bar.set_label("attention weight (square-root scale)", fontsize=style.TICK, color=style.INK)
    bar.ax.tick_params(labelsize=style.TICK, colors=style.INK)
    style.headline(
        figure,
        "An attention sink: a token that draws attention without carrying meaning",
        note,
    )
    return figure


def sink_variants(
    results: Mapping[str, Mapping[str, float]], *, title: str | None = None
) -> Figure:
    """Bars per attention variant: attention to BOS where it is not needed, and the loss.

    Args:
        results: variant -> {"attention_to_bos": share in [0, 1], "loss": nats per token};
            shown in the given order.
        title: of the figure.
    Returns:
        The figure: two panels that share the variants.
    Raises:
        ValueError: no variant, or one without those two numbers.
    """
    if not results:
        raise ValueError("results: expected at least one variant, got none")
    for name, numbers in results.items():
        missing = {"attention_to_bos", "loss"} - set(numbers)
        if missing:
            raise ValueError(f"results: variant {name!r} lacks {sorted(missing)}")
    names = list(results)
    share = [float(results[name]["attention_to_bos"]) for name in names]
    loss = [float(results[name]["loss"]) for name in names]
    figure = style.new_figure(9.0, 1.7 + 0.42 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = np.arange(len(names))
    colours = [style.RED if value > 0.3 else style.BLUE for value in share]
    left.barh(rows, share, color=colours, height=0.62)
    for row, value in zip(rows, share, strict=True):
        left.text(
            value + 0.015, row, f"{value:.2f}", va="center", fontsize=style.TICK, color=style.INK
        )
    style.dress(left, title="mean weight on BOS from non-trigger queries", x="share of attention")
    left.set_xlim(0, 1.12)
    left.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    left.set_yticks(rows, names, fontsize=style.LABEL)
    left.invert_yaxis()
    left.grid(False, axis="y")
    right.plot(loss, rows, "o", color=style.INK, markersize=7)
    spread = max(max(loss) - min(loss), 0.05)
    right.set_xlim(min(loss) - 0.35 * spread, max(loss) + 0.75 * spread)
    for row, value in zip(rows, loss, strict=True):
        right.annotate(
            f"{value:.3f}",
            (value, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TICK,
            color=style.INK,
        )
    style.dress(right, title="validation loss", x="nats per token")
    right.tick_params(axis="y", length=0)
    style.headline(
        figure,
        title or "Which attention needs a sink",
        "Bigram-Backcopy task; red above 0.3. A head that has nothing to copy needs somewhere to "
        "put its weight, or a way to put none.",
    )
    return figure


def _spread(count: int, most: int = 4) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _draw_map(axes: Axes, weights: np.ndarray, top: float):
    hidden = ~np.tri(*weights.shape, dtype=bool) & (weights == 0)
    shown = np.ma.masked_array(np.abs(weights), hidden)
    axes.set_facecolor(style.HIDDEN)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes.imshow(
        shown,
        cmap=style.MAP,
        norm=PowerNorm(0.5, vmin=0, vmax=top),
        interpolation="nearest",
        aspect="equal",
    )


def _token_axes(
    axes: Axes, length: int, tokens: Sequence[str] | None, *, x: bool, y: bool, size: float
) -> None:
    axes.tick_params(labelsize=style.TICK, colors=style.INK, length=2, width=0.5)
    if tokens is not None and length <= _LABELLED:
        labels = style.token_labels(tokens[:length])
        points = min(style.TICK, size * 72 / length * 0.8)
        axes.set_xticks(range(length), labels, fontsize=points, parse_math=False)
        axes.set_yticks(range(length), labels, fontsize=points, parse_math=False)
        for text in axes.get_xticklabels():
            if len(text.get_text()) > 1:
                text.set_rotation(90)
    else:
        style.whole_ticks(axes)
        style.whole_ticks(axes, x=False)
        if x:
            axes.set_xlabel("key position", fontsize=style.TICK, color=style.INK)
        if y:
            axes.set_ylabel("query position", fontsize=style.TICK, color=style.INK)
    if not x:
        axes.set_xticklabels([])
    if not y:
        axes.set_yticklabels([])
