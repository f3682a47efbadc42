"""`analyze` against oracles computed in float64 from the dense capture of the same model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sinkjax.diagnose import METRICS, Report, Settings, analyze, capture, rows_of_texts
from sinkjax.diagnose.analysis import _measure
from sinkjax.diagnose.metrics import ENTRIES
from sinkjax.models import Decoder, DecoderConfig, abstract

CONFIG = DecoderConfig(
    vocab_size=257,
    model_dim=14,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=11,
    context_length=13,
    normalizer="softmax1",
    gate="headwise",
    init_std=0.4,
)
TOKENS = np.random.default_rng(0).integers(0, 257, size=(3, 11))
SETTINGS = Settings(epsilon=0.15, sink_tokens=7)


class Bytes:
    bos_id = 256

    def encode(self, text):
        return list(text.encode())


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(5))


@pytest.fixture(scope="module")
def report(model):
    return analyze(model, TOKENS, settings=SETTINGS)


@pytest.fixture(scope="module")
def seen(model):
    return capture(model, TOKENS)


def test_all_metrics_have_definitions_and_the_axes_they_claim(report):
    sizes = {"L": 2, "N": 6, "S": 7, "half": 2, "who": 2, "rank": 3, "L+1": 3}
    assert set(report.scalars) | set(report.arrays) == set(ENTRIES)
    for name, array in report.arrays.items():
        assert array.shape == tuple(sizes[axis] for axis in report.axes(name).split()), name
    for name in report.scalars:
        assert report.axes(name) == ""


def test_sinks_are_measured_on_the_first_tokens(report, seen):
    weights = np.asarray(seen.weights, np.float64)[..., :7, :7]  # causal: rows do not change
    alpha = weights.sum(-2) / np.arange(7, 0, -1)
    row_sums = np.abs(weights).sum(-1, keepdims=True) + 1e-8
    proxy = (np.abs(weights) / row_sums).sum(-2) / np.arange(7, 0, -1)
    np.testing.assert_allclose(report["importance"], alpha[..., 0].mean(1), rtol=1e-4)
    np.testing.assert_allclose(report["importance_normalized"], proxy[..., 0].mean(1), rtol=1e-4)
    np.testing.assert_allclose(report["importance_by_position"], alpha.mean((1, 2)), rtol=1e-4)
    assert report["sink_rate"] == pytest.approx((alpha[..., 0] > 0.15).mean(), abs=1e-6)
    assert report["sink_rate_normalized"] == pytest.approx((proxy[..., 0] > 0.15).mean(), abs=1e-6)
    mean_first = (alpha[..., 0].mean(1) > 0.15).mean()
    assert report["sink_rate_mean_first"] == pytest.approx(mean_first, abs=1e-6)
    assert 0 < report["sink_rate"] < report["sink_rate_normalized"]
    assert report["uniform_importance"] == pytest.approx(sum(1 / i for i in range(1, 8)) / 7)


def test_statistics_over_all_tokens(report, seen):
    weights = np.asarray(seen.weights, np.float64)
    share = weights[..., 0].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(report["first_token_share_by_layer"], share, rtol=1e-4)
    np.testing.assert_allclose(report["row_mass"], weights.sum(-1).mean((1, 3)), rtol=1e-4)
    np.testing.assert_allclose(report["sink_mass"], 1 - report["row_mass"], atol=1e-5)
    p = weights / weights.sum(-1, keepdims=True)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean((1, 3))
    np.testing.assert_allclose(report["entropy_by_head"], entropy, rtol=1e-4)
    norm = np.linalg.norm(np.asarray(seen.value, np.float64), axis=-1).mean((1, 3))  # [L, T]
    np.testing.assert_allclose(report["value_drain"], norm[:, 0] / norm[:, 1:].mean(1), rtol=1e-4)
    np.testing.assert_allclose(
        report["value_norm"], np.stack([norm[:, 0], norm[:, 1:].mean(1)], 1), rtol=1e-4
    )
    residual = np.linalg.norm(np.asarray(seen.residual, np.float64), axis=-1).mean(2)
    np.testing.assert_allclose(
        report["residual_peak"], residual[..., 0] / residual[..., 1:].mean(-1), rtol=1e-4
    )


def test_activations_and_kurtosis(report, seen):
    stream = np.asarray(seen.residual, np.float64)  # [L, 2, B, T, D]
    flat = np.abs(stream).reshape(2, 2, 3, -1)
    psi = (flat.max(-1) / np.median(flat, -1)).mean(-1)
    np.testing.assert_allclose(report["activation_psi"], psi, rtol=1e-4)
    assert report["max_inf_norm"] == pytest.approx(flat.max(-1).mean(-1).max(), rel=1e-4)
    assert report["m_act"] == pytest.approx(flat[:, 1].max(-1).mean(), rel=1e-4)
    signed = stream.reshape(2, 2, 3, -1)
    centred = signed - signed.mean(-1, keepdims=True)
    bondarenko = ((centred**4).mean(-1) / (signed.std(-1, ddof=1) ** 4 + 1e-6)).mean(-1)
    np.testing.assert_allclose(report["kurtosis_bondarenko"], bondarenko, rtol=1e-3)
    layers = np.concatenate([np.asarray(seen.embedding, np.float64)[None], stream[:, 1]])
    excess = (layers**4).mean(-1) / layers.std(-1, ddof=1) ** 4 - 3
    osp = np.maximum(excess, 0).mean((1, 2))
    np.testing.assert_allclose(report["kurtosis_osp_by_layer"], osp, rtol=1e-3)
    assert report["gate_mean"] == pytest.approx(float(seen.gate.mean()), rel=1e-5)


def test_a_scanned_rematerialised_model_gives_the_same_numbers(report):
    """Statistics go through the scan; what is dense would unroll it, see test_capture."""
    names = ("sink_rate", "importance", "first_token_share", "norms", "massive_activations")
    assert not any(METRICS[name].dense for name in names)
    config = dataclasses.replace(CONFIG, scan_layers=True, remat="dots")
    scanned = Decoder(config, rngs=nnx.Rngs(5))
    again = analyze(scanned, jnp.asarray(TOKENS), settings=SETTINGS, metrics=names)
    assert len(again.arrays) > 10
    for name, value in again.arrays.items():
        np.testing.assert_allclose(value, report[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_only_what_is_asked_is_measured(model):
    found = analyze(model, TOKENS, metrics=("first_token_share", "norms"), settings=SETTINGS)
    assert "first_token_share" in found and "value_drain" in found
    assert "kurtosis_osp" not in found
    assert not METRICS["norms"].dense and METRICS["kurtosis"].dense
    with pytest.raises(KeyError, match="kurtosis_osp.*was not measured"):
        found["kurtosis_osp"]


def test_the_report_prints_and_survives_json(report, tmp_path):
    text = str(report)
    assert "3 sequences of 11 tokens; sinks at position 0, T=7, ε=0.15" in text
    assert "sink_rate_normalized " in text and "v drain" in text
    odd = dataclasses.replace(report, scalars=dict(report.scalars, m_act=float("inf")))
    written = odd.to_json(tmp_path / "deep" / "report.json")
    strict = json.loads((tmp_path / "deep" / "report.json").read_text(), parse_constant=pytest.fail)
    assert json.loads(written) == strict
    back = Report.from_dict(strict)
    assert back.scalars == odd.scalars and back["m_act"] == float("inf")
    for name, value in report.arrays.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-6)
    assert back.metadata["model"]["normalizer"] == "softmax1"


def test_texts_become_rows_that_start_with_bos():
    rows = rows_of_texts(["abcdefgh", "xy", "pqrst"], Bytes(), length=4, max_rows=9)
    expected = ["abc", "def", "pqr"]  # remainders that fill no row are dropped
    assert rows[:, 0].tolist() == [256] * 3
    assert ["".join(map(chr, row[1:])) for row in rows] == expected
    assert len(rows_of_texts(["abcdefgh"], Bytes(), length=4, max_rows=1)) == 1
    assert rows_of_texts(["ab", "a"], Bytes(), length=99, max_rows=9).tolist() == [[256, 97, 98]]


def test_analyze_takes_texts(model):
    ids = rows_of_texts(["some text, cut"], Bytes(), length=13, max_rows=32)
    by_text = analyze(model, ["some text, cut"], tokenizer=Bytes(), metrics=["norms"])
    by_ids = analyze(model, ids, metrics=["norms"])
    np.testing.assert_array_equal(by_text["value_drain"], by_ids["value_drain"])
    assert by_text.metadata["sequences"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(metrics=["sinkrate"]), "metrics: expected some of sink_rate, importance"),
        (dict(metrics=[]), "metrics: expected some of"),
        (dict(tokens=np.zeros((0, 5), int)), r"tokens: expected \[B, T\]"),
        (dict(tokens=np.zeros((2, 1), int)), r"tokens: expected \[B, T\]"),
        (dict(tokens=np.full((1, 5), 257)), r"tokens: expected ids in \[0, 257\), got 257"),
        (dict(tokens=["text"]), "tokenizer: expected one"),
        (dict(tokens=[""], tokenizer=Bytes()), "tokens: expected texts with at least one token"),
        (dict(tokens="text", tokenizer=Bytes()), "tokens: expected .* got one string"),
        (dict(settings=Settings(position=11)), "position: expected below 11 tokens, got 11"),
    ],
)
def test_bad_input_names_the_argument(model, arguments, message):
    arguments = {"tokens": TOKENS} | arguments
    with pytest.raises(ValueError, match=message):
        analyze(model, arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
    "options", [dict(epsilon=1.5), dict(sink_tokens=1), dict(position=-1)], ids=str
)
def test_impossible_settings_raise(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        Settings(**options)


def test_metrics_that_are_not_dense_form_no_attention_map():
    length = 2053
    config = dataclasses.replace(CONFIG, context_length=length, scan_layers=True)
    names = tuple(name for name, metric in METRICS.items() if not metric.dense)
    graphdef, state = nnx.split(abstract(config))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    settings = Settings(sink_tokens=length)
    jaxpr = jax.make_jaxpr(_measure, static_argnums=(0, 1, 2))(
        graphdef, names, settings, state, tokens
    )
    shapes = {var.aval.shape for equation in _equations(jaxpr.jaxpr) for var in equation.outvars}
    assert any(length in shape for shape in shapes)
    assert not [shape for shape in shapes if sum(size >= length for size in shape) > 1]


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
