"""Pictures over the depth of a model: sinks by layer and head, norms, massive activations."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from sinkjax.diagnose.plots import style


def sink_map(
    values: Float[Array | np.ndarray, "L N"],
    *,
    epsilon: float = 0.3,
    num_tokens: int | None = None,
    title: str = "Importance of the first token, by layer and head",
    note: str | None = None,
    label: str = "importance α₁",
) -> Figure:
    """Layer x head heat map of the first token's importance (or of the sink rate).

    Args:
        values: mean importance alpha_1, or sink rate, in [0, 1].
        epsilon: threshold of the sink rate; a cell above it is framed.
        num_tokens: T, for the uniform baseline in the note.
        title, note, label: text of the figure, of the line below, of the colour bar.
    Returns:
        The figure; values are printed when there are at most 160 cells.
    """
    values = np.asarray(values, np.float64)
    layers, heads = values.shape
    figure = style.new_figure(min(max(5.6, 2.2 + 0.62 * heads), 12), min(2.2 + 0.45 * layers, 10))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=style.MAP, vmin=0, vmax=1, aspect="auto")
    if layers * heads <= 160:
        for (layer, head), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 else "black"
            axes.text(
                head, layer, f"{value:.2f}", ha="center", va="center", color=colour,
                fontsize=style.TICK,
            )  # fmt: skip
    for layer, head in np.argwhere(values > epsilon).tolist():
        axes.add_patch(_frame(head, layer, 1.8 if values.size <= 160 else 0.8))
    axes.set_xlabel("head", fontsize=style.LABEL, color=style.INK)
    axes.set_ylabel("layer", fontsize=style.LABEL, color=style.INK)
    axes.tick_params(labelsize=style.TICK, colors=style.INK, length=2)
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(layers))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=style.TICK, color=style.INK)
    bar.ax.tick_params(labelsize=style.TICK, colors=style.INK)
    if note is None:
        note = f"α₁ = mean weight on the first token over all queries; framed: α₁ > {epsilon:g}"
        if num_tokens is not None:
            uniform = sum(1 / i for i in range(1, num_tokens + 1)) / num_tokens
            note += f"; uniform attention at T={num_tokens}: {uniform:.3f}"
    style.headline(figure, title, note)
    return figure


def importance_by_position(
    importance: Float[Array | np.ndarray, "L S"], *, title: str = "Importance by position"
) -> Figure:
    """Mean importance of each key position, one line per layer, on a log scale.

    Args:
        importance: alpha_k, mean over samples and heads.
        title: of the figure.
    Returns:
        The figure, with the curve of uniform causal attention for comparison.
    """
    importance = np.asarray(importance, np.float64)
    layers, length = importance.shape
    figure = style.new_figure(7.6, 4.2)
    axes = figure.subplots()
    for layer, colour in enumerate(_depth_colours(layers)):
        label = f"layer {layer}" if layers <= 8 or layer in (0, layers - 1) else None
        axes.plot(range(length), importance[layer], color=colour, linewidth=1.6, label=label)
    harmonic = np.cumsum((1 / np.arange(1, length + 1))[::-1])[::-1]
    uniform = harmonic / np.arange(length, 0, -1)
    axes.plot(range(length), uniform, "--", color=style.GREY, linewidth=1.3, label="uniform")
    axes.set_yscale("log")
    style.dress(axes, x="key position k", y="importance αₖ")
    style.whole_ticks(axes)
    style.legend(axes, ncols=2)
    style.headline(figure, title, "αₖ = mean weight on key k over the queries that can see it")
    return figure


def norms_over_layers(
    *,
    residual: Float[Array | np.ndarray, "R 2"],
    key: Float[Array | np.ndarray, "L 2"],
    value: Float[Array | np.ndarray, "L 2"],
    first: str = "first token (BOS)",
    title: str = "Norms of the first token and of the others",
) -> Figure:
    """L2 norms of hidden states, keys and values: first token against the mean of the rest.

    Args:
        residual: [2L, 2] norms after every half-block (attention, MLP, attention, ...); column 0
            is the first token, column 1 the mean of the others.
        key, value: [L, 2] the same for keys (after RoPE) and values.
        first: name of the first token. title: of the figure.
    Returns:
        The figure: three panels.
    """
    figure = style.new_figure(10.4, 3.7)
    panels = zip(
        figure.subplots(1, 3), ("residual stream", "keys (after RoPE)", "values"),
        (residual, key, value), strict=True,
    )  # fmt: skip
    for number, (axes, name, norms) in enumerate(panels):
        norms = np.asarray(norms, np.float64)
        depth = (np.arange(len(norms)) + 1) / 2 if number == 0 else np.arange(len(norms))
        marker = "o" if len(norms) <= 24 else None
        axes.plot(depth, norms[:, 0], color=style.RED, marker=marker, markersize=4.5, label=first)
        axes.plot(
            depth, norms[:, 1], color=style.BLUE, marker=marker, markersize=4.5,
            linestyle="--", label="mean of the others",
        )  # fmt: skip
        style.dress(axes, title=name, x="blocks passed" if number == 0 else "layer")
        axes.set_xlim(depth[0] - 0.5, depth[-1] + 0.5)
        axes.set_ylim(bottom=0, top=1.12 * max(float(np.nanmax(norms)), 1e-9))
        style.whole_ticks(axes)
    figure.axes[0].set_ylabel("L2 norm", fontsize=style.LABEL, color=style.INK)
    style.legend(figure.axes[0], loc="best")
    style.headline(
        figure,
        title,
        "A sink shows as a small value norm (drain) and, in deeper models, a residual peak",
    )
    return figure


def massive_activations(
    top: Float[Array | np.ndarray, "R 3"],
    median: Float[Array | np.ndarray, " R"],
    *,
    title: str = "Largest activations over depth",
) -> Figure:
    """Three largest magnitudes and the median of the residual stream, per half-block.

    Args:
        top: [2L, 3] mean over samples of the three largest |x|, largest first.
        median: [2L] mean over samples of the median |x|.
        title: of the figure.
    Returns:
        The figure, on a log scale, with the line of 1000 x median.
    """
    top, median = np.asarray(top, np.float64), np.asarray(median, np.float64)
    depth = (np.arange(len(top)) + 1) / 2
    figure = style.new_figure(7.6, 4.2)
    axes = figure.subplots()
    for rank, colour in enumerate((style.RED, style.ORANGE, style.PINK)):
        axes.plot(
            depth, top[:, rank], color=colour, marker="o", markersize=4, label=f"top {rank + 1}"
        )
    axes.plot(depth, median, color=style.BLUE, marker="s", markersize=4, label="median")
    axes.plot(depth, 1000 * median, ":", color=style.GREY, label="1000 × median")
    axes.set_yscale("log")
    style.dress(axes, x="blocks passed (half steps: after attention)", y="|activation|")
    style.whole_ticks(axes)
    style.legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.headline(
        figure, title, "Massive (Sun et al. 2024): |x| > 100 and at least 1000 × the median |x|"
    )
    return figure


def _depth_colours(count: int) -> Sequence:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    return [colours(x) for x in np.linspace(0.05, 0.85, max(count, 1))]


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))


def _frame(column: int, row: int, linewidth: float):
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor=style.SKY,
        linewidth=linewidth,
    )  # fmt: skip
