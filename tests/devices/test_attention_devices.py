"""Attention on a mesh: each device computes its rows and heads, and the numbers are those of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.attention import attention_statistics, dot_product_attention
from sinkjax.ops.decode import decode_step
from sinkjax.sharding import make_mesh

H, HV = 5, 3


def operands(B, T, N, K):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "query": draw(B, T, N, H),
        "key": draw(B, T, K, H),
        "value": draw(B, T, K, HV),
        "bias": draw(1, N, 1, T),
        "sinks": draw(N),
    }


SEGMENTS = np.arange(11) // 6
CASES = {
    # sizes (B, T, N, K), mesh (data, model), options
    "tiles": ((8, 270, 6, 2), (4, 2), {"local_window_size": (30, 0), "num_sink_tokens": 2}),
    "packed": ((4, 11, 4, 2), (4, 2), {"query_segment_ids": SEGMENTS, "key_segment_ids": SEGMENTS}),
    "fewer key heads than shards": ((2, 11, 8, 2), (2, 4), {}),
    "nothing divides": ((3, 11, 5, 5), (4, 2), {"normalizer": "softmax1"}),
    "one device": ((2, 11, 4, 2), (1, 1), {}),
    "a constant sink": ((4, 11, 2, 2), (4, 2), {"normalizer": "softmax1"}),
    "rows": ((4, 11, 2, 2), (4, 2), {"normalizer": "entmax15"}),
}


def test_key_heads_that_no_number_of_shards_divides_are_cut_too():
    arrays = operands(2, 11, 12, 6)
    arrays.pop("bias")

    def run(arrays):
        return dot_product_attention(**arrays, is_causal=True)

    found = []
    for shards in (1, 4):
        with jax.set_mesh(make_mesh(1, shards)):
            program = jax.jit(run).lower(arrays).compile()
            found.append((program.cost_analysis()["flops"], np.asarray(program(arrays))))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    assert found[1][0] < 0.5 * found[0][0]


@pytest.mark.parametrize(
    ("name", "explicit"), [("tiles", False), *((name, True) for name in CASES)]
)
def test_equals_one_device(name, explicit):
    sizes, axes, options = CASES[name]
    arrays = operands(*sizes)
    if "normalizer" in options:
        arrays.pop("sinks")

    def loss(arrays):
        query, key, value = (arrays[x] for x in ("query", "key", "value"))
        named = {n: arrays[n] for n in ("bias", "sinks") if n in arrays} | options
        out = dot_product_attention(query, key, value, is_causal=True, **named)
        mass = attention_statistics(query, key, is_causal=True, **named).key_mass
        return (out**2).sum(), (out, mass)

    run = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(run)(arrays)
    with jax.set_mesh(make_mesh(*axes, explicit=explicit)):
        got = jax.jit(run)(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def test_a_mesh_moves_no_keys():
    """Each device has its own rows and heads: the program for 8 communicates nothing."""
    arrays = operands(8, 11, 4, 2)

    def run(query, key, value):
        return dot_product_attention(query, key, value, is_causal=True)

    mesh = make_mesh(4, 2)
    layout = jax.NamedSharding(mesh, jax.P("data", None, "model", None))
    placed = [jax.device_put(arrays[x], layout) for x in ("query", "key", "value")]
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*placed).compile().as_text()
    assert "all-" not in text and "collective" not in text


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)], ids=["cut", "key heads stay whole"])
def test_a_decode_step_equals_that_of_one_device(heads):
    (N, K), B, S = heads, 4, 7
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arrays = {
        "query": draw(B, 1, N, H),
        "new_key": draw(B, 1, K, H),
        "new_value": draw(B, 1, K, HV),
        "key": draw(B, K, S, H),
        "value": draw(B, K, S, HV),
        "slots": jnp.arange(B),
        "query_positions": jnp.full((B, 1), S),
        "key_positions": jnp.where(jnp.arange(S) == jnp.arange(B)[:, None], S, jnp.arange(S)),
        "sinks": draw(N),
    }
    want = jax.jit(lambda x: decode_step(**x))(arrays)
    with jax.set_mesh(make_mesh(2, 2)):
        got = jax.jit(lambda x: decode_step(**x))(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-6, atol=2e-6)
