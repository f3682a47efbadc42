"""Streaming, measured: what is compared computes the same, and the verdict can be no."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import SinkWindow
from sinkjax.models import Decoder, DecoderConfig

FOLDER = Path(__file__).parents[2] / "experiments"
MODULES = ("stream_text", "stream_time", "streaming")
C = 13


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("streaming")
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(
        vocab_size=263,
        model_dim=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=36,
        context_length=5 * C,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: 4 * x, state))
    return model


# --- time


def test_all_ways_to_stream_compute_the_same(experiment, decoder, monkeypatch):
    """A full cache far into a stream, its keys un-rotated for the two that rotate them."""
    times = experiment.stream_time
    monkeypatch.setattr(times, "CHUNK", 5)
    monkeypatch.setattr(times, "TOKENS", 2)
    cache = times.aged(decoder, SinkWindow(4, C - 4), 2, 3 * C)
    assert cache.time.tolist() == [3 * C] * 2
    held = [0, 1, 2, 3, *range(2 * C + 4, 3 * C)]
    assert sorted(cache.positions[0][0].tolist()) == held
    others = times.as_published(decoder, cache), times.in_a_ring(decoder, cache)
    ours, single = (times.cached(decoder, jax.tree.map(jnp.copy, cache), n) for n in (None, 1))
    for _ in range(C // 2):
        want = np.asarray(ours())
        assert np.ptp(want) > 1
        single()
        for other in (*others, single):
            np.testing.assert_allclose(other(), want, atol=2e-5)


def test_recomputation_is_the_model_on_the_last_tokens(experiment, decoder, monkeypatch):
    monkeypatch.setattr(experiment.stream_time, "TOKENS", 1)
    step = experiment.stream_time.recomputed(decoder, C, 2)
    first = step()
    np.testing.assert_allclose(
        first, decoder(jnp.zeros((2, C), jnp.int32)).logits[:, -1], atol=1e-5
    )
    history = jnp.zeros((2, C), jnp.int32).at[:, -1].set(first.argmax(-1))
    np.testing.assert_allclose(step(), decoder(history).logits[:, -1], atol=1e-5)


@pytest.mark.slow
def test_times_of_all_ways(experiment, decoder, monkeypatch):
    times = experiment.stream_time
    monkeypatch.setattr(times, "random_model", lambda *how: decoder)
    monkeypatch.setattr(times, "ROOM", 40)
    monkeypatch.setattr(times, "TOKENS", 3)
    found = times.per_token(C, 1, 5 * C, rounds=2)
    ways = {"one per call", "rotate, as published", "rotate in a ring", "dense", "recompute"}
    assert set(found["over"]) == ways and set(found["seconds"]) == {"ours", *ways}
    assert all(0 < x < 60 for x in found["seconds"].values())
    per_slot = 2 * 2 * 10 * 4 + 4
    assert found["cache_bytes"] == {"ours": per_slot * C + 4, "dense": per_slot * 5 * C + 4}


def test_ratios_are_those_within_a_round(experiment):
    class Step:
        def __init__(self, times):
            self.times, self.calls, self.tokens = times, 0, 1

        def seconds(self, steps):
            self.calls += 1
            return self.times[max(self.calls - 3, 0)]

    steps = {"slow": Step([2, 20, 200]), "fast": Step([1, 10, 50])}
    found = experiment.stream_time.in_turn(steps, 3)
    assert found == {"slow": [2, 20, 200], "fast": [1, 10, 50]}
    assert experiment.stream_time.over(found["slow"], found["fast"]) == 2


# --- perplexity


def test_a_stream_in_passes_is_one_stream(experiment, decoder):
    text = experiment.stream_text
    rng = np.random.default_rng(0)
    passage, description = rng.integers(0, 60, 29), SinkWindow(2, C - 2)
    found = text.long_stream(decoder, passage, 3, description, (61,), chunk_size=8)
    assert found["tokens"] == 3 * 29 + 1 and found["evicted"] > 0
    assert found["cache_bytes"][0] == found["cache_bytes"][1]
    whole = text.beyond(decoder, np.tile(passage, 3), description, (61,), 2 * 29, chunk_size=8)
    np.testing.assert_allclose(found["perplexities"][2], whole, rtol=1e-5)
    want = found["perplexities"][2] / found["perplexities"][1] - 1
    np.testing.assert_allclose(found["drift"], want)


def test_sinks_that_are_dropped_and_found(experiment, decoder, monkeypatch):
    text = experiment.stream_text
    monkeypatch.setattr(text, "SINKS", (0, 2))
    monkeypatch.setattr(text, "detect_sinks", lambda *how, **more: np.asarray([[0, 1, -1, -1]]))
    seen = []

    def beyond(model, tokens, cache, lead, skip):
        seen.append(getattr(cache, "description", getattr(cache, "cache", cache)))
        return float(len(seen))

    monkeypatch.setattr(text, "beyond", beyond)
    monkeypatch.setattr(text, "pinned", lambda model, cache, tokens: cache)
    found = text.without_sinks(decoder, np.arange(40) % 60, (61,), C)
    assert found == {"perplexity": {"0": 1.0, "2": 2.0, "detected": 3.0}, "positions": [0, 1]}
    assert [one.capacity for one in seen] == [C] * 3 and seen[1].num_sink_tokens == 2
    assert seen[2].num_pins == 4


def test_bits(experiment, decoder, monkeypatch):
    text = experiment.stream_text
    seen = []
    monkeypatch.setattr(text, "beyond", lambda *how: seen.append(how[2]) or 7.0)
    found = text.in_few_bits(decoder, np.zeros(3), (61,), C, sinks=2, group_size=2, residual=1)
    assert [getattr(one, "first_full_precision", "all") for one in seen] == ["all", *[None, 0] * 2]
    size = [row["bytes"] for row in found.values()]
    assert size[0] == 2 * 2 * 10 * 4 * C + 4 * C + 4 and size[3] < size[1]


# --- the command


GOOD = {
    "over_recompute": {"64": 3.0, "256": 22.2},
    "over_rotate_all": 4.0,
    "time_1m_over_10k": 0.96,
    "perplexity_drift": -0.02,
    "long_stream": {"cache_bytes": [5, 5]},
}


def test_verdict(experiment):
    assert experiment.wrong(GOOD) == [] and experiment.wrong({}) == []
    for bad in (
        {"over_recompute": {"256": 22.1}},
        {"over_rotate_all": 3.9},
        {"time_1m_over_10k": 1.06},
        {"time_1m_over_10k": float("nan")},
        {"perplexity_drift": 0.03},
        {"long_stream": {"cache_bytes": [5, 6]}},
    ):
        assert len(experiment.wrong(GOOD | bad)) == 1, bad


def test_it_says_what_it_found(experiment, tmp_path, monkeypatch, capsys):
    def per_token(slots, rows, *rest):
        over = {"rotate, as published": 5.0, "rotate in a ring": 2.0, "dense": 3.0}
        over["recompute"] = 21.0
        seconds = {"ours": 1.0} | {name: ratio for name, ratio in over.items()}
        sizes = {"ours": 7, "dense": 8}
        return {
            "slots": slots,
            "rows": rows,
            "seconds": seconds,
            "over": over,
            "cache_bytes": sizes,
        }

    places = {"ratio": 1.01, "cache_bytes": [7, 7]}
    run = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(context_length=8)), model=None
    )
    stream = {
        "perplexities": [9.0, 8.0, 8.1],
        "drift": 0.0125,
        "cache_bytes": [7, 7],
        "memory_growth_bytes": 0,
        "seconds": [1.0, 1.0, 1.0],
        "tokens": 1234567,
    }
    sinks = {"perplexity": dict.fromkeys(("0", "1", "2", "4", "detected"), 3.25), "positions": [13]}
    text, time = experiment.stream_text, experiment.stream_time
    monkeypatch.setattr(time, "per_token", per_token)
    monkeypatch.setattr(time, "at_positions", lambda *how: places)
    for name in ("text_model", "backcopy_model"):
        monkeypatch.setattr(text, name, lambda *how: run)
    monkeypatch.setattr(text, "held_out_bytes", lambda *how: np.zeros(3))
    monkeypatch.setattr(text, "long_stream", lambda *how: stream)
    monkeypatch.setattr(text, "without_sinks", lambda *how: dict(sinks))
    monkeypatch.setattr(text, "importance", lambda run: 0.87)
    bits = {"full precision": {"perplexity": 3.5, "bytes": 4321}}
    monkeypatch.setattr(text, "in_few_bits", lambda *how, **more: bits)
    config = experiment.Experiment(quick=True, json=tmp_path / "found.json", out=tmp_path)
    assert experiment.main(config) == 1  # 21 times at C = 256
    found = json.loads(config.json.read_text())
    assert found["over_recompute"] == {"64": 21.0, "256": 21.0} and len(found["wrong"]) == 1
    assert (found["over_rotate_all"], found["over_dense"], found["time_1m_over_10k"]) == (
        5,
        3,
        1.01,
    )
    assert found["perplexity_drift"] == 0.0125 and found["sinks_perplexity"]["detected"] == 3.25
    assert found["quantised"]["toy task"] == bits
    assert found["seed"] == 0 and found["versions"] and found["device"] and found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0
    shown = capsys.readouterr().out
    for word in ("1,234,567", "3359.95", "13", "4,321", "5000.00 (5.0)"):
        assert word in shown, word
