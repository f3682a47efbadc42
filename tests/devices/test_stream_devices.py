"""Streams on a mesh: rows over `data`, heads over `model`, and the tokens are those of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import SinkWindow
from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters
from sinkjax.sharding import cache_shardings, make_mesh, shardings

B, T, C = 8, 19, 23
CONFIG = DecoderConfig(
    vocab_size=48,
    model_dim=24,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=10,
    mlp_dim=40,
    context_length=C,
)
DESCRIPTION = SinkWindow(3, C - 3)
VALID = 5 + 2 * np.arange(B)  # rows of different age
COLLECTIVE = r" = .*? (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\S*\("


@functools.partial(jax.jit, donate_argnums=1)
def prompt(params, cache, tokens):
    positions = jnp.where(jnp.arange(T) < VALID[:, None], cache.next_positions(T), -1)
    output = from_parameters(CONFIG, params)(tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(output.logits, VALID[:, None, None] - 1, axis=1)[:, 0]
    return jnp.argmax(last, axis=-1)[:, None], output.cache


@functools.partial(jax.jit, donate_argnums=1)
def step(params, cache, tokens):
    output = from_parameters(CONFIG, params)(tokens, cache=cache)
    return jnp.argmax(output.logits[:, -1], axis=-1)[:, None], output.cache


def stream(params, cache):
    """Greedy tokens [B, C] past the end of the ring, the cache after them, the step's program."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T))
    token, cache = prompt(params, cache, tokens)
    found, program = [token], step.lower(params, cache, token).compile()
    for _ in range(C - 1):
        token, cache = program(params, cache, token)
        found.append(token)
    return np.concatenate(found, axis=1), cache, program.as_text()


@pytest.fixture(scope="module")
def model():
    # Larger than at the start of training: greedy tokens differ from each other by more than rounding.
    params = jax.tree.map(lambda x: 5 * x, parameters(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    return from_parameters(CONFIG, params)


@pytest.fixture(scope="module")
def expected(model):
    tokens, cache, _ = stream(parameters(model), model.init_cache(DESCRIPTION, B))
    assert all(len(set(row)) > 5 for row in tokens.tolist())
    return tokens, cache


@pytest.mark.parametrize("axes", [pytest.param((4, 2), marks=pytest.mark.slow), (2, 4)])
def test_a_stream_is_that_of_one_device(axes, model, expected):
    mesh = make_mesh(*axes)
    params, cache = parameters(model), model.init_cache(DESCRIPTION, B)
    layout = cache_shardings(cache, mesh)
    assert layout.layers[0].key.spec == jax.P("data", "model")
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        tokens, after, text = stream(params, jax.device_put(cache, layout))
    np.testing.assert_array_equal(tokens, expected[0])
    for leaf, want, place in zip(*map(jax.tree.leaves, (after, expected[1], layout)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_allclose(leaf, want, atol=2e-4)
    # C is no size of anything else; each leaf is updated where it lies.
    moved = re.findall(rf".*{COLLECTIVE}.*", text)
    assert moved and not [line for line in moved if re.search(rf"[\[,]{C}[,\]]", line)]
    header = text[: text.index("entry_computation_layout")]
    assert header.count("may-alias") + header.count("must-alias") == len(jax.tree.leaves(after))


def test_layouts_of_all_kinds_of_leaves():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {
        "key": leaf(B, 4, C, 10),
        "codes": leaf(B, 4, 3, 5, 10),
        "queries": leaf(B, 7, 8, 10),
        "positions": leaf(B, 1, C),
        "decay": leaf(B, 8, C),
        "query_positions": leaf(B, 7),
    }
    odd = {"key": leaf(B, 3, C, 10), "decay": leaf(B, 6, C)}
    tree = {"layers": [layer, odd], "time": leaf(B), "scored": {"positions": leaf(6, 4, C)}}
    found = jax.tree.map(lambda place: place.spec, cache_shardings(tree, make_mesh(4, 2)))
    cut, rows = jax.P("data", "model"), jax.P("data")
    assert found["layers"][0] == {
        "key": cut,
        "codes": cut,
        "queries": jax.P("data", None, "model"),
        "positions": rows,
        "decay": cut,
        "query_positions": rows,
    }
    assert found["layers"][1] == {
        "key": rows,
        "decay": rows,
    }  # three key heads stay whole, all of it
    assert found["time"] == rows and found["scored"]["positions"] == jax.P(None, "model")
    only = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    assert cache_shardings(layer, only)["key"].spec == rows
