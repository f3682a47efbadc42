"""Figures: what is drawn equals what was given, and nothing warns."""

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sinkjax.diagnose import plots
from sinkjax.diagnose.plots import style

L, N, T = 3, 2, 7


def causal(shape=(L, N, T, T)):
    weights = np.tril(np.random.default_rng(0).uniform(0.1, 1, size=shape))
    return weights / weights.sum(-1, keepdims=True)


def saved(figure: Figure) -> Any:
    """The figure, after it could be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert buffer.tell() > 1000
    return figure


def test_attention_maps_show_each_head_and_hide_the_future():
    weights = causal()
    figure = saved(plots.attention_maps(weights, layers=[0, 2], heads=[1]))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["layer 0, head 1", "layer 2, head 1"]
    np.testing.assert_allclose(images[1].get_array().filled(-1)[5, :6], weights[2, 1, 5, :6])
    assert images[1].get_array().mask[2].tolist() == [False] * 3 + [True] * 4


def test_a_single_map_is_labelled_with_tokens_of_any_kind():
    tokens = ["BOS", " ", "\n", "$x$", "中", "é", "\x07"]
    figure = saved(plots.attention_maps(causal((1, 1, T, T)), tokens))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["BOS", "␣", "↵", "$x$", r"\u4e2d", "é", r"\x07"]
    assert style.token_labels([""]) == ["∅"]


def test_the_grid_of_a_large_model_is_a_sample_of_it():
    figure = plots.attention_maps(causal((12, 9, 3, 3)))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 16
    assert titles[0] == "layer 0, head 0" and titles[-1] == "layer 11, head 8"


def test_caches_are_bars_that_start_before_the_best():
    rows = [
        {
            "group": group,
            "label": f"{group} {i}",
            "nll_beyond": 2.0 + 0.1 * i,
            "cache_bytes": 4321 * i,
        }
        for group in ("sinks", "bits")
        for i in range(1, 4)
    ]
    figure = saved(plots.of_caches(rows))
    panels = [axes for axes in figure.axes if axes.patches]
    assert [p.get_title(loc="left") for p in panels] == [
        "number of sink tokens",
        "bits of keys and values",
    ]
    assert [bar.get_width() for bar in panels[1].patches] == pytest.approx([2.1, 2.2, 2.3])
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["sinks 1", "sinks 2", "sinks 3"]
    assert panels[0].get_xlim() == panels[1].get_xlim() and panels[0].get_xlim()[0] < 2.1
    assert "2.300  12,963" in {text.get_text() for text in panels[0].texts}
    with pytest.raises(ValueError, match="expected groups sinks, policy, bits, got none"):
        plots.of_caches([])


def test_what_a_sink_is_states_the_share_on_bos():
    sink = np.zeros((T, T))
    sink[:, 0] = 1.0
    figure = saved(plots.what_a_sink_is(sink, np.eye(T), ["BOS", *"abcdef"]))
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["softmax: 100% of attention on BOS", "softmax1: 0% of attention on BOS"]


def test_sink_variants_draws_the_numbers():
    results = {
        "softmax": {"attention_to_bos": 0.9, "loss": 1.72},
        "softmax1": {"attention_to_bos": 0.01, "loss": 1.73},
    }
    figure = saved(plots.sink_variants(results))
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [0.9, 0.01]
    assert [text.get_text() for text in left.get_yticklabels()] == ["softmax", "softmax1"]
    assert list(right.lines[0].get_xdata()) == [1.72, 1.73]
    with pytest.raises(ValueError, match="results: variant 'a' lacks"):
        plots.sink_variants({"a": {"loss": 1.0}})
    with pytest.raises(ValueError, match="results: expected at least one"):
        plots.sink_variants({})


def test_sink_map_frames_what_passes_the_threshold():
    values = np.array([[0.1, 0.5], [0.31, 0.29], [0.0, 1.0]])
    figure = saved(plots.sink_map(values, num_tokens=64))
    axes = figure.axes[0]
    corners = sorted((round(p.get_y() + 0.48), round(p.get_x() + 0.48)) for p in axes.patches)
    assert corners == [(0, 1), (1, 0), (2, 1)]
    assert "0.31" in [text.get_text() for text in axes.texts]
    words = " ".join(text.get_text() for text in figure.texts)
    assert "uniform attention at T=64: 0.074" in words


def test_importance_by_position_has_the_uniform_curve():
    figure = saved(plots.importance_by_position(np.full((L, 64), 0.1)))
    uniform = figure.axes[0].lines[-1].get_ydata()
    assert len(figure.axes[0].lines) == L + 1
    assert uniform[0] == pytest.approx(0.0741, abs=1e-4)
    assert uniform[-1] == pytest.approx(1 / 64)


def test_norms_and_massive_activations_over_depth():
    rng = np.random.default_rng(1)
    residual, key, value = rng.uniform(1, 2, (2 * L, 2)), rng.uniform(1, 2, (L, 2)), np.ones((L, 2))
    figure = saved(plots.norms_over_layers(residual=residual, key=key, value=value))
    first, others = figure.axes[0].lines
    np.testing.assert_array_equal(first.get_xdata(), [0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_array_equal(first.get_ydata(), residual[:, 0])
    np.testing.assert_array_equal(others.get_ydata(), residual[:, 1])
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), key[:, 1])
    top = np.array([[3.0, 2.0, 1.0], [300.0, 20.0, 2.0]])
    figure = saved(plots.massive_activations(top, np.array([0.1, 0.2])))
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), top[:, 0])
    np.testing.assert_allclose(figure.axes[0].lines[-1].get_ydata(), [100.0, 200.0])


def test_curves_over_steps_reduce_heads_and_skip_other_rows():
    rows = [
        {"step": 20, "nll": 1.5, "importance": [[0.1, 0.6], [0.2, 0.3]]},
        {"step": 10, "loss": 9.0, "nll": 9.0, "split": "train"},
        {"step": 0, "split": "validation", "nll": 2.5, "importance": [[0.1, 0.2], [0.2, 0.1]]},
    ]
    figure = saved(plots.over_steps(rows, baselines={"importance": 0.074}))
    loss, importance = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [0, 20])
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [2.5, 1.5])
    np.testing.assert_array_equal(importance.lines[0].get_ydata(), [0.2, 0.6])  # largest head
    np.testing.assert_array_equal(importance.lines[1].get_ydata(), [0.2, 0.3])
    assert importance.lines[2].get_ydata()[0] == 0.074
    renamed: Any = plots.over_steps([{"step": 1, "x": 3.0}], {"x": "my own title"})
    assert renamed.axes[0].get_title(loc="left") == "my own title"
    with pytest.raises(ValueError, match="rows: expected some with 'step'"):
        plots.over_steps([{"step": 1, "other": 2.0}])


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys, numpy as np\n"
        "from sinkjax.diagnose import plots\n"
        "plots.sink_map(np.ones((2, 2)))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
    assert done.returncode == 0, done.stderr


def _env():
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
