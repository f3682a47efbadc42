"""Head plans: classes from scores, what the cache is told, and the file."""

import json

import numpy as np
import pytest

from sinkjax.cache import Full, PerHead, PerLayer, SinkWindow
from sinkjax.cache.head_plan import HeadPlan

SCORES = np.array([[0.9, 0.2, 0.4], [0.1, 0.8, 0.3]])


def test_the_highest_scores_retrieve():
    half = ((True, False, True), (False, True, False))
    assert HeadPlan.from_scores(SCORES).retrieval == half
    assert HeadPlan.from_scores(SCORES, threshold=0.4).retrieval == half  # itself included
    third = HeadPlan.from_scores(SCORES, sparsity=1 / 3)
    assert third.retrieval == ((True, False, True), (False, True, True))
    assert third.sparsity == pytest.approx(1 / 3) and third.settings == {"sparsity": 1 / 3}
    assert HeadPlan.from_scores(SCORES, sparsity=0).sparsity == 0
    assert HeadPlan.from_scores(SCORES, sparsity=1).sparsity == 1
    # Five heads at 0.75 are 3.75: four of them stream.
    assert HeadPlan.from_scores(SCORES[:1, :1].repeat(5, 1), sparsity=0.75).retrieval == (
        (False, False, False, False, True),
    )


def test_heads_that_were_not_asked_stream_and_do_not_count():
    scores = np.concatenate([[[np.nan] * 3], SCORES, [[np.nan] * 3]])
    plan = HeadPlan.from_scores(scores, sparsity=0.5)
    idle = (False, False, False)
    assert plan.retrieval == (idle, (True, False, True), (False, True, False), idle)
    assert plan.scores[0] == (None,) * 3 and plan.scores[1] == (0.9, 0.2, 0.4)
    assert HeadPlan.from_scores(scores, threshold=-1.0).sparsity == 0.5


def test_description_of_a_cache():
    plan = HeadPlan(((True, False, True), (False,) * 3, (True,) * 3), num_sink_tokens=5, window=11)
    streaming = SinkWindow(5, 11, "absolute")
    assert plan.description(97) == PerLayer(
        (PerHead((((0, 2), Full(97)), ((1,), streaming))), streaming, Full(97))
    )
    assert hash(plan) == hash(HeadPlan(plan.retrieval, 5, 11, settings={}))
    assert plan.sparsity == pytest.approx(4 / 9)
    assert plan.share(97) == pytest.approx((5 * 97 + 4 * 16) / (9 * 97))


def test_lazy_layers():
    plan = HeadPlan.from_lazy_layers(np.array([True, False]), 3, settings={"threshold": 0.9})
    assert plan.retrieval == ((False,) * 3, (True,) * 3) and plan.method == "lazy_layers"
    assert plan.description(99).layers == (SinkWindow(4, 1024, "absolute"), Full(99))


def test_the_file_gives_the_same_plan(tmp_path):
    settings = {"steps": np.int32(7), "loss": float("nan"), "sizes": (1, 2)}
    scores = np.where(SCORES == 0.2, np.nan, SCORES)
    plan = HeadPlan.from_scores(
        scores, sparsity=0.6, num_sink_tokens=3, window=13, method="head_gates", settings=settings
    )
    path = plan.save(tmp_path / "new" / "heads.json")
    assert HeadPlan.load(path) == plan
    written = json.loads(path.read_text())
    assert written["retrieval"] == [[True, False, False], [False, True, False]]
    assert written["scores"][0] == [0.9, None, 0.4]
    assert written["settings"] == {"steps": 7, "loss": None, "sizes": [1, 2], "sparsity": 0.6}
    assert [file.name for file in path.parent.iterdir()] == ["heads.json"]
    path.write_text(path.read_text().replace('"window": 13', '"windows": 13'))
    with pytest.raises(ValueError, match=r"heads.json: unknown keys windows"):
        HeadPlan.load(path)
    path.write_text('{"retrieval": [[1, 0]]}')
    with pytest.raises(ValueError, match=r"retrieval\[0\]\[0\]: expected bool, got 1"):
        HeadPlan.load(path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HeadPlan(()), "retrieval: expected layers .* got layers of"),
        (lambda: HeadPlan(((True,), (True, False))), r"retrieval: .* got layers of \[1, 2\] heads"),
        (lambda: HeadPlan(((True,),), scores=((0.1, 0.2),)), "scores: expected 1 layers of 1"),
        (lambda: HeadPlan(((True,),), window=0), "window: expected an integer of at least 1"),
        (lambda: HeadPlan.from_scores(SCORES[0]), r"scores: expected \[L, K\], got shape \(3,\)"),
        (lambda: HeadPlan.from_scores(SCORES, sparsity=1.5), "sparsity: expected .* got 1.5"),
        (lambda: HeadPlan.from_scores(SCORES, sparsity=0.5, threshold=0.5), "expected one of them"),
        (
            lambda: HeadPlan.from_scores(SCORES).check(4, 3),
            "expected one for 4 layers of 3 key/value heads, got one for 2 layers of 3",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_check_gives_the_plan():
    plan = HeadPlan.from_scores(SCORES)
    assert plan.check(2, 3) is plan
