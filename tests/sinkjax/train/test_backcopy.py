"""The comparison of attention variants: its settings, its measure, and the claim in small."""

import dataclasses

import numpy as np
import pytest

from sinkjax.diagnose import capture
from sinkjax.train import VARIANTS, attention_to_bos, backcopy_run, fit, held_out_rows
from sinkjax.train.tasks import Backcopy


def test_attention_to_bos_counts_idle_queries_only():
    weights = np.zeros((2, 1, 4, 4))
    weights[0, 0, :, 0] = [1.0, 0.8, 0.3, 0.6]
    weights[1, 0, :, 0] = [1.0, 0.5, 0.1, 0.9]
    trigger = np.array([[False, False, True, False], [False, True, False, False]])
    # Row 0: queries 1 and 3; row 1: queries 2 and 3. BOS's own 1.0 would raise the mean.
    assert attention_to_bos(weights, trigger) == pytest.approx((0.8 + 0.6 + 0.1 + 0.9) / 4)


def test_runs_differ_in_the_variant_alone():
    plain = backcopy_run("softmax", "x", seed=3).model
    for name, fields in VARIANTS.items():
        run = backcopy_run(name, "x", seed=3)
        assert run.model == dataclasses.replace(plain, **fields)
        assert (run.seed, run.data.seed, run.steps) == (3, 3, 400)
    assert plain.context_length == 32 and run.data.batch_size == 64
    assert backcopy_run("sigmoid, bias -ln T", "x").model.normalizer == "sigmoid(bias=-3.4657)"


def test_unknown_variant_lists_the_choices():
    with pytest.raises(ValueError, match="expected one of softmax, softmax1, .*got 'softmax2'"):
        backcopy_run("softmax2", "x")


def test_held_out_rows_are_new():
    rows = held_out_rows(64)["tokens"]
    assert rows.shape == (64, 32)
    for seed in (0, 1, 2**32):  # runs, and the validation rows of run 0
        trained_on = {row.tobytes() for row in Backcopy(32, seed).rows(np.arange(2000))["tokens"]}
        assert not trained_on & {row.tobytes() for row in rows}


def test_a_sink_grows_with_softmax_and_not_with_softmax1(tmp_path):
    """The claim of experiments/backcopy.py after half of its steps, with a wide margin."""
    rows = held_out_rows(64)
    found = {}
    for name in ("softmax", "softmax1"):
        run = fit(backcopy_run(name, tmp_path / name, seed=1, steps=200), progress=False)
        weights = np.asarray(capture(run.model, rows["tokens"]).weights[0])
        found[name] = attention_to_bos(weights, rows["is_trigger"] == 1), run.metrics[-1]["nll"]
    assert found["softmax"][0] > 0.3 and found["softmax1"][0] < 0.15
    assert abs(found["softmax"][1] - found["softmax1"][1]) < 0.05
