import jax
import numpy as np
import pytest

from sinkjax.cache import Full
from sinkjax.stream import evaluate, prefill

TEXT = np.random.default_rng(5).integers(0, 257, 75)
P, W = 3, 11
C = P + W


@pytest.fixture
def dense_nll(model, dense):
    """Of tokens[1:], from one dense pass."""

    def run(tokens):
        logits = np.asarray(jax.nn.log_softmax(dense(model, tokens), axis=-1))
        return -logits[np.arange(len(tokens) - 1), np.asarray(tokens)[1:]]

    return run


def run(model, **options):
    return evaluate(model, TEXT, num_sink_tokens=P, window=W, chunk_size=9, **options)


def test_recompute_is_dense_attention_to_the_last_c(model, dense_nll):
    result = run(model, policies=["recompute"], lead=())["recompute"]
    np.testing.assert_array_equal(result.positions, np.arange(1, TEXT.size))
    want = [dense_nll(TEXT[max(i - C, 0) : i + 1])[-1] for i in (1, 2, C - 1, C, C + 1, 40, 74)]
    got = result.nll[np.asarray([1, 2, C - 1, C, C + 1, 40, 74]) - 1]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_all_policies_agree_until_the_first_eviction(model, dense_nll):
    results = run(model, lead=())
    dense = dense_nll(TEXT)
    for result in results.values():
        np.testing.assert_allclose(result.nll[: C - 1], dense[: C - 1], atol=2e-5)
    assert np.abs(results["window"].nll - results["sink_window"].nll)[C + 1 :].max() > 1e-3
    assert np.abs(results["recompute"].nll - results["sink_window"].nll)[C + 1 :].max() > 1e-3


def test_window_sees_no_sinks_and_sink_window_does(model):
    """One layer: the loss is the closed form of the mask, which a dense cache gives by hand."""
    results = run(model, lead=(), policies=["window", "sink_window"])
    for policy, sinks in (("window", 0), ("sink_window", P)):
        at = 60
        near = list(range(at - (C - sinks), at))
        kept = [*range(sinks), *near]
        # cache-relative positions: the kept tokens stand side by side
        logits, _ = prefill(model, model.init_cache(Full(C), 1), TEXT[kept][None], chunk_size=9)
        want = -jax.nn.log_softmax(logits[0])[TEXT[at]]
        np.testing.assert_allclose(results[policy].nll[at - 1], want, atol=2e-5)


def test_chunk_size_does_not_matter(model):
    a = run(model, policies=["sink_window"])["sink_window"]
    b = evaluate(model, TEXT, policies=["sink_window"], num_sink_tokens=P, window=W, chunk_size=32)[
        "sink_window"
    ]
    np.testing.assert_allclose(a.nll, b.nll, atol=2e-5)
    np.testing.assert_array_equal(a.positions, b.positions)


def test_lead(model, dense_nll):
    """Learned sink tokens by default: they predict the first token and are not scored."""
    learned = list(model.config.learned_sink_ids)
    default, given = run(model), run(model, lead=learned)
    for policy, result in default.items():
        np.testing.assert_array_equal(result.nll, given[policy].nll)
        np.testing.assert_array_equal(result.positions, np.arange(TEXT.size))
        want = dense_nll([*learned, *TEXT])[len(learned) - 1 :][: C - len(learned)]
        np.testing.assert_allclose(result.nll[: len(want)], want, atol=2e-5)
    row = [*learned, *TEXT[40 - (C - len(learned)) : 41]]
    np.testing.assert_allclose(default["recompute"].nll[40], dense_nll(row)[-1], atol=2e-5)


def test_every_and_progress(model):
    seen = []
    whole = run(model, lead=(), policies=["recompute"])["recompute"]
    sparse = run(
        model,
        lead=(),
        policies=["recompute"],
        every=7,
        progress=lambda policy, done, total: seen.append((policy, done, total)),
    )["recompute"]
    np.testing.assert_array_equal(sparse.positions, np.arange(1, TEXT.size, 7))
    np.testing.assert_allclose(sparse.nll, whole.nll[::7], atol=2e-5)
    assert seen == [("recompute", 8, 11), ("recompute", 11, 11)]


def test_one_program_for_a_text_of_any_length(model, traces):
    for length in (20, 75):
        evaluate(model, TEXT[:length], num_sink_tokens=2, window=9, chunk_size=8, batch_size=5)
    assert sorted(traces) == [(1, 8), (1, 8), (5, 11)]  # two caches, one recomputation


def test_summary(model):
    result = run(model, lead=(), policies=["window"])["window"]
    summary = result.summary(beyond=C)
    assert summary["tokens"] == 74 and summary["policy"] == "window"
    np.testing.assert_allclose(summary["nll"], result.nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(summary["perplexity"], np.exp(result.nll.mean()), rtol=1e-5)
    np.testing.assert_allclose(summary["nll_beyond"], result.nll[C - 1 :].mean(), rtol=1e-6)
    assert result.cache_bytes == 2 * C * 4 * 4 + C * 4 + 4
    assert np.isnan(result.summary(beyond=500)["nll_beyond"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["windw"]}, "policies: expected some of recompute, window, sink_window"),
        ({"tokens": TEXT[:1], "lead": ()}, "tokens: expected .* at least two"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"lead": list(range(1020))}, "lead: expected fewer than C=14 ids"),
        ({"window": 0}, "SinkWindow.window"),
        ({"window": 62}, "context_length=64 slots"),
    ],
)
def test_bad_input(model, options, message):
    import jaxtyping

    arguments = {"tokens": TEXT, "num_sink_tokens": P, "window": W, "chunk_size": 9} | options
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            evaluate(model, **arguments)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
