"""Rows of the Bigram-Backcopy task follow its rule and its table."""

import time

import numpy as np
import pytest

from sinkjax.train.tasks import BOS_ID, NUM_TRIGGERS, VOCAB_SIZE, Backcopy, bigram_table


@pytest.fixture(scope="module")
def batch():
    return Backcopy(length=32, seed=3).rows(np.arange(4001))


def test_table_is_fixed_and_favours_triggers():
    table = bigram_table()
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    # 64 symbols of Dirichlet(1) rows: 1/64 in the mean, and 0.05 more before normalising.
    assert table[:, :NUM_TRIGGERS].mean() == pytest.approx((1 / 64 + 0.05) / 1.15, rel=0.15)
    assert table[:, NUM_TRIGGERS:].mean() == pytest.approx(1 / 64 / 1.15, rel=0.02)
    np.testing.assert_array_equal(table, bigram_table())


def test_rows_lead_with_bos_and_copy_after_triggers(batch):
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == (4001, 32) and tokens.dtype == np.int32
    assert (tokens[:, 0] == BOS_ID).all() and (tokens[:, 1:] < BOS_ID).all()
    assert BOS_ID == VOCAB_SIZE - 1
    assert (tokens[:, 1] >= NUM_TRIGGERS).all()
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    trigger = batch["is_trigger"].astype(bool)
    np.testing.assert_array_equal(trigger, tokens < NUM_TRIGGERS)
    before = np.concatenate([tokens[:, :1], tokens[:, :-1]], axis=1)
    np.testing.assert_array_equal(targets[trigger], before[trigger])
    assert (trigger[:, 1:] & trigger[:, :-1]).sum() == 0


def test_everything_else_follows_the_bigram_table(batch):
    other = (batch["is_trigger"] == 0) & (batch["tokens"] != BOS_ID)
    pairs = batch["tokens"][other], batch["targets"][other]
    counts = np.zeros((64, 64))
    np.add.at(counts, pairs, 1)
    seen = counts[NUM_TRIGGERS:]
    expected = bigram_table()[NUM_TRIGGERS:] * seen.sum(axis=1, keepdims=True)
    # chi-squared over about 61 * 63 degrees of freedom: mean 1 each, deviation sqrt(2 / 3843).
    fine = expected > 1
    statistic = ((seen - expected) ** 2 / expected)[fine].mean()
    assert statistic == pytest.approx(1.0, abs=0.1)


def test_first_symbol_is_uniform_over_non_triggers(batch):
    counts = np.bincount(batch["tokens"][:, 1], minlength=64)[NUM_TRIGGERS:64]
    assert ((counts - 4001 / 61) ** 2 / (4001 / 61)).mean() == pytest.approx(1.0, abs=0.6)


def test_a_row_depends_on_seed_and_index_only():
    task = Backcopy(length=13, seed=7)
    together, apart = task.rows(np.arange(11)), task.rows(np.asarray([9, 2]))
    for name in together:
        np.testing.assert_array_equal(together[name][[9, 2]], apart[name])
    other = Backcopy(length=13, seed=8).rows(np.arange(11))
    assert (other["tokens"] != together["tokens"]).any(axis=1).all()
    assert len(np.unique(together["tokens"], axis=0)) == 11


def test_a_batch_is_made_faster_than_a_step_takes():
    task = Backcopy()
    best = np.inf
    for n in range(5):
        start = time.perf_counter()
        task.rows(np.arange(64) + 64 * n)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02  # a step of the one-layer model takes 20 ms; this about 1 ms


def test_too_short_rows_are_refused():
    with pytest.raises(ValueError, match="length: expected at least 3"):
        Backcopy(length=2)
