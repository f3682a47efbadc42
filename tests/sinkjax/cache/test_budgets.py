import jax
import numpy as np
import pytest

from sinkjax.cache import budgets, policies


def test_uniform():
    plan = budgets.Uniform.of(131, 0.3)
    assert plan == budgets.Uniform(91) and [plan.layer(i, 3) for i in range(3)] == [91] * 3
    assert budgets.Uniform.of(3, 0.9).size == 1  # never nothing
    assert isinstance(plan, budgets.Budget)
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got 3"):
        plan.layer(3, 3)


def test_pyramid_by_hand():
    """s = 100, β = 4: from 175 down to 25."""
    plan = budgets.Pyramid(100, window=7, beta=4)
    assert [plan.layer(i, 5) for i in range(5)] == [175, 138, 100, 62, 25]  # 137.5, 62.5: to even
    assert sum(plan.layer(i, 7) for i in range(7)) == 700
    assert plan.layer(0, 1) == 175
    assert isinstance(plan, budgets.Budget)


def test_pyramid_at_its_ends():
    # Layer 0 cannot have 175 of 150 − 7: the rest goes to the last one.
    cut = budgets.Pyramid(100, window=7, beta=4, length=150)
    assert [cut.layer(i, 3) for i in range(3)] == [143, 100, 57]
    # 25 would not hold a window of 26.
    flat = budgets.Pyramid(100.5, window=26, beta=4)
    assert [flat.layer(i, 3) for i in range(3)] == [100, 100, 100]
    even = budgets.Pyramid(100, window=26, beta=1)
    assert [even.layer(i, 3) for i in range(3)] == [100, 100, 100]


# ---- AdaKV ----

B, K, S = 2, 3, 11
share = jax.jit(
    lambda *args, safeguard, budget, capacity=None: budgets.Ada(safeguard).keep(
        *args, budget, capacity
    ),
    static_argnames=("safeguard", "budget", "capacity"),
)


def draw(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(B, K, S)) * np.array([1.0, 3.0, 0.2])[:, None]
    scores[..., 4] = 0.5  # ties between heads
    scores[0, 0, 2], scores[1, 2, 1] = np.nan, np.inf
    protect, empty = rng.random((2, B, K, S)) < 0.15
    return scores.astype(np.float32), protect, empty


def by_hand(scores, protect, empty, safeguard, budget, capacity):
    """Kept slots of each head of one row."""

    def worth(k, s):
        score = 0 if protect[k, s] else -np.inf if np.isnan(scores[k, s]) else scores[k, s]
        return protect[k, s], score, s, k

    heads = [sorted((s for s in range(S) if not empty[k, s]), key=lambda s: worth(k, s))[::-1]
             for k in range(K)]  # fmt: skip
    heads = [head[:capacity] for head in heads]
    number = max(1, int(budget * safeguard)) if safeguard else 0
    pool = [
        ((protect[k, s], place < number or protect[k, s], *worth(k, s)[1:]), k, s)
        for k, head in enumerate(heads)
        for place, s in enumerate(head)
    ]
    best = sorted(pool)[::-1][: K * budget]
    return [sorted(s for _, k, s in best if k == head) for head in range(K)]


@pytest.mark.parametrize("safeguard, capacity", [(0.2, None), (0.0, 6), (1.0, 4)])
def test_ada(safeguard, capacity):
    budget = 4
    for seed in range(6):
        scores, protect, empty = draw(seed)
        kept = share(scores, protect, empty, safeguard=safeguard, budget=budget, capacity=capacity)
        assert kept.slots.shape == (B, K, capacity or S)
        for b in range(B):
            expected = by_hand(scores[b], protect[b], empty[b], safeguard, budget, capacity or S)
            assert kept.counts[b].tolist() == [len(head) for head in expected]
            for k, head in enumerate(expected):
                got = kept.slots[b, k].tolist()
                assert got == head + [-1] * (len(got) - len(head))
                assert set(np.flatnonzero(protect[b, k] & ~empty[b, k])) <= set(head)


def test_ada_with_a_full_safeguard_is_uniform():
    scores, protect, empty = draw(1)
    none = np.zeros_like(empty)
    kept = share(scores, protect, none, safeguard=1.0, budget=4, capacity=4)
    assert kept.counts.tolist() == [[4] * K] * B
    keep = jax.jit(policies.keep, static_argnums=3)
    np.testing.assert_array_equal(kept.slots, keep(scores, protect, none, 4))


def test_ada_moves_budget_to_the_head_that_needs_it():
    scores = np.zeros((B, K, S), np.float32)
    scores[0, 1], scores[1, 2] = 1, 1
    none = np.zeros(scores.shape, bool)
    kept = share(scores, none, none, safeguard=0.2, budget=4)
    assert kept.counts.tolist() == [[1, 10, 1], [1, 1, 10]]
    assert kept.slots[0, 0].tolist() == [S - 1] + [-1] * (S - 1)
    assert kept.slots[1, 2].tolist() == [*range(1, S), -1]


def test_bad_input_is_refused():
    for make, match in (
        (lambda: budgets.Uniform(0), "Uniform.size: expected at least 1, got 0"),
        (lambda: budgets.Uniform.of(9, 1.0), "ratio: expected at least 0 and below 1, got 1.0"),
        (lambda: budgets.Pyramid(0), "Pyramid.size: expected at least 1, got 0"),
        (lambda: budgets.Pyramid(9, beta=0.5), "Pyramid.beta: expected at least 1, got 0.5"),
        (lambda: budgets.Pyramid(9, window=-1), "Pyramid.window: expected at least 0, got -1"),
        (lambda: budgets.Pyramid(9, length=8), "Pyramid.length: expected at least the size of 9"),
        (lambda: budgets.Ada(1.1), "Ada.safeguard: expected 0 to 1, got 1.1"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    scores, protect, empty = draw(0)
    with pytest.raises(ValueError, match="budget: expected 0 to S = 11, got 12"):
        share(scores, protect, empty, safeguard=0.2, budget=12)
    with pytest.raises(ValueError, match="capacity: expected the budget of 4 to 11, got 3"):
        share(scores, protect, empty, safeguard=0.2, budget=4, capacity=3)
