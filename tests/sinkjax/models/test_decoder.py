"""Decoder: one set of numbers unrolled, scanned and rematerialised; what the masks promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full
from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters, unroll

CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=37,
    context_length=64,
    sinks=True,
    gate="headwise",
    qk_norm=True,
    windows=(4, None),
    num_sink_tokens=2,
    init_std=0.2,
)
ONE = dataclasses.replace(CONFIG, num_layers=1, windows=(None,))
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)
B, T = 3, 13
PENALTIES = ("decorrelation", "tweo", "hidden_z_loss")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (B, T)))


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    graph = request.param == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def stack(params, pattern):
    """Parameters of an unrolled model as those of a scanned one: the inverse of `unroll`."""
    layers = params["blocks"]
    stacked = {
        i: jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *[layers[j] for j in range(i, len(layers), pattern)]
        )
        for i in range(pattern)
    }
    return params | {"blocks": stacked}


forward = jax.jit(lambda model, tokens, **kwargs: model(tokens, **kwargs))


@jax.jit
def everything(model):
    """Output with statistics, and the gradient of a loss that touches all parameters."""

    def loss(model):
        output = model(TOKENS, statistics=True, penalties=PENALTIES)
        aux = 100 * sum(output.aux.values())
        return jax.nn.logsumexp(output.logits, axis=-1).sum() + (
            output.hidden**2
        ).sum() + aux, output

    gradient, output = jax.grad(loss, has_aux=True)(model)
    return output, parameters(gradient)


@pytest.fixture(scope="module")
def expected(model):
    return everything(model)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [(True, "none"), (False, "full"), (True, "full"), (True, "dots")],
)
def test_equal_numbers_in_every_mode(model, expected, scan, remat):
    config = dataclasses.replace(CONFIG, scan_layers=scan, remat=remat)
    params = parameters(model)
    output, gradient = everything(from_parameters(config, stack(params, 2) if scan else params))
    wanted = (stack(expected[1], 2) if scan else expected[1]), expected[0]
    assert jax.tree.structure((gradient, output)) == jax.tree.structure(wanted)
    for (path, got), want in zip(
        jax.tree.leaves_with_path((gradient, output)), jax.tree.leaves(wanted), strict=True
    ):
        name, scale = jax.tree_util.keystr(path), float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=2e-5 * max(scale, 1), err_msg=name)
    statistics = output.statistics
    assert all(value.shape[:2] == (4, B) for value in statistics.values())
    # In the order of the layers: the last query sees its window, and sink tokens outside of it.
    seen = np.asarray(statistics["key_count"][:, 0, 0, 5])
    np.testing.assert_array_equal(seen, [4, 8, 4, 8])


def test_penalties_are_those_of_the_residual_stream(model):
    """Against NumPy on the captured stream: padding is left out, BOS is that of the segment."""
    segments = np.asarray([[1] * 6 + [2] * 5 + [0] * 2, [1] * 13, [1] * 2 + [2] * 9 + [3] * 2])

    @jax.jit
    def captured(model):
        call = nnx.capture(model, nnx.Intermediate)
        return call(TOKENS, segment_ids=jnp.asarray(segments), penalties=PENALTIES)

    output, found = captured(model)
    assert set(output.aux) == set(PENALTIES)
    blocks = nnx.to_pure_dict(found)["blocks"]
    stream = np.stack([np.asarray(blocks[i]["residual_mlp"][0], np.float64) for i in range(4)])
    real = segments != 0
    want = {
        "tweo": ((np.abs(stream) / 3) ** 4).mean(-1)[:, real].mean(),
        "hidden_z_loss": (np.log(np.exp(np.abs(stream[-1])).sum(-1)) ** 2)[real].mean(),
    }
    unit = stream / np.linalg.norm(stream, axis=-1, keepdims=True)
    cosines = []
    for b in range(B):
        for number in range(1, segments[b].max() + 1):
            text = unit[:-1, b, segments[b] == number]
            cosines.append(np.einsum("LTD,LD->LT", text[:, 1:], text[:, 0]).ravel() ** 2)
    want["decorrelation"] = np.concatenate(cosines).mean()
    for name, value in want.items():
        np.testing.assert_allclose(output.aux[name], value, rtol=1e-4, err_msg=name)


def test_penalties_that_make_no_sense_are_refused(model):
    with pytest.raises(ValueError, match="penalties: expected some of hidden_z_loss.*; got twee"):
        model(TOKENS, penalties=("tweo", "twee"))
    shallow = from_parameters(ONE, parameters(Decoder(ONE, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="at least 2 layers with decorrelation.*got 1"):
        shallow(TOKENS, penalties=("decorrelation",))
    with pytest.raises(ValueError, match="penalties: expected none with a cache, got tweo"):
        cache = shallow.init_cache(Full(16), B)
        shallow(TOKENS, cache=cache, penalties=("tweo",))


def test_rematerialisation_keeps_less(model):
    def residuals(config, params):
        run = from_parameters(config, params)
        backward = jax.eval_shape(lambda run: jax.vjp(lambda m: m(TOKENS).logits, run)[1], run)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    params = parameters(model)
    kept = {
        remat: residuals(dataclasses.replace(CONFIG, remat=remat), params)
        for remat in ("none", "full", "attention", "dots")
    }
    assert kept["full"] < kept["attention"] < kept["dots"] < kept["none"], kept


def test_a_seed_names_one_model_whatever_the_layout(model):
    scanned = Decoder(SCANNED, rngs=nnx.Rngs(0))
    unrolled = unroll(scanned)
    assert unrolled.config == CONFIG and unroll(unrolled) is unrolled
    for got, want in zip(
        jax.tree.leaves(parameters(unrolled)), jax.tree.leaves(parameters(model)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    layers = np.asarray(scanned.blocks[0].attention.query.kernel[...])
    assert not np.allclose(layers[0], layers[1])
    one, other = (parameters(scanned.layer(i))["mlp"]["up"]["kernel"] for i in (3, 1))
    np.testing.assert_array_equal(one, parameters(model)["blocks"][3]["mlp"]["up"]["kernel"])
    assert not np.allclose(one, other)


def test_parameter_paths(model):
    params = parameters(model)
    assert set(params) == {"embedding", "blocks", "final_norm", "head"}
    assert params["embedding"]["embedding"].shape == (31, 22)
    assert params["head"]["kernel"].shape == (22, 31)
    assert params["final_norm"]["scale"].shape == (22,)
    assert list(params["blocks"]) == list(range(4))
    assert set(params["blocks"][0]) == {"attention", "attention_norm", "mlp", "mlp_norm"}
    tied = Decoder(dataclasses.replace(CONFIG, tied_head=True), rngs=nnx.Rngs(0))
    assert set(parameters(tied)) == {"embedding", "blocks", "final_norm"}


def test_tree_mode_and_graph_mode_and_capture(mode, expected):
    scanned = Decoder(SCANNED, rngs=nnx.Rngs(0))
    for model in (scanned, unroll(scanned)):
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
        graphdef, params = nnx.split(model, nnx.Param)

        @jax.jit
        def captured(params, graphdef=graphdef):
            return nnx.capture(nnx.merge(graphdef, params), nnx.Intermediate)(TOKENS)

        output, found = captured(params)
        np.testing.assert_allclose(output.logits, expected[0].logits, atol=2e-5)
        assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == paths
        found = nnx.to_pure_dict(found)
        if model is scanned:
            assert not jax.tree.leaves(found)
            continue
        assert sorted(found["blocks"]) == list(range(4))
        assert found["blocks"][3]["attention"]["weights"][0].shape == (B, 6, T, T)
        hidden = model.final_norm(found["blocks"][3]["residual_mlp"][0])
        np.testing.assert_allclose(output.hidden, hidden, rtol=1e-5, atol=1e-5)


def test_head_gives_the_logits(model, expected):
    output = expected[0]
    np.testing.assert_allclose(model.head(output.hidden), output.logits, rtol=1e-5, atol=1e-5)
    config = dataclasses.replace(CONFIG, tied_head=True, dtype="bfloat16", num_layers=2)
    tied = Decoder(config, rngs=nnx.Rngs(0))
    output = forward(tied, TOKENS)
    assert output.logits.dtype == jnp.float32 and output.hidden.dtype == jnp.bfloat16
    table = tied.embedding.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)
    want = output.hidden.astype(jnp.float32) @ table.T
    np.testing.assert_allclose(tied.head(output.hidden), want, rtol=1e-5, atol=1e-5)

    def through_the_head(m):
        return m.head(jax.lax.stop_gradient(output.hidden)).sum()

    gradient = parameters(jax.grad(through_the_head)(tied))["embedding"]["embedding"]
    assert jnp.abs(gradient).sum() > 0


def test_packed_segments_equal_single_documents(model):
    first, second = TOKENS[0, :5], TOKENS[1, :8]
    rows = [
        (jnp.concatenate([first, second]), [*range(5), *range(8)], [1] * 5 + [2] * 8),
        (TOKENS[2].at[:5].set(first), [*range(5)] + [-1] * 8, [1] * 5 + [0] * 8),
        (TOKENS[2].at[:8].set(second), [*range(8)] + [-1] * 5, [1] * 8 + [0] * 5),
    ]
    tokens, positions, segments = (
        jnp.stack([jnp.asarray(x) for x in xs]) for xs in zip(*rows, strict=True)
    )
    packed, one, other = forward(model, tokens, positions=positions, segment_ids=segments).logits
    np.testing.assert_allclose(packed[:5], one[:5], atol=2e-5)
    np.testing.assert_allclose(packed[5:], other[:8], atol=2e-5)


def test_no_token_sees_a_later_one(model):
    changed = forward(model, TOKENS.at[:, 8].add(1) % 31).logits
    moved = jnp.abs(changed - forward(model, TOKENS).logits).max(axis=(0, 2)) > 1e-6
    assert not moved[:8].any() and moved[8:].all()


def test_unknown_token_is_not_a_neighbour(model):
    logits = forward(model, TOKENS.at[0, 3].set(31)).logits
    assert jnp.isnan(logits[0, 3]).all() and not jnp.isnan(logits[1:]).any()


def test_same_seed_same_model(model):
    again = Decoder(CONFIG, rngs=nnx.Rngs(0))
    other = Decoder(CONFIG, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(again.embedding.embedding[...], model.embedding.embedding[...])
    assert not np.allclose(other.embedding.embedding[...], model.embedding.embedding[...])
