"""Embedding lookups on meshes of 8 devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.embedding import embed
from sinkjax.sharding import batch_sharding, make_mesh, shardings

B, T, D = 8, 12, 24


@pytest.mark.parametrize(
    ("V", "axes", "explicit"),
    [
        (38, dict(data=2, sequence=2, model=2), False),
        (37, dict(data=4, model=2), True),  # 37 rows stay whole over `model`
        pytest.param(38, dict(data=2, expert=2, sequence=2), True, marks=pytest.mark.slow),
        pytest.param(38, dict(data=2, sequence=2, model=2), True, marks=pytest.mark.slow),
    ],
)
def test_lookups_on_a_mesh_equal_one_device(V, axes, explicit):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)

    def loss(table, tokens, weights):
        x = embed(table, tokens)
        return (weights * x).sum(), x

    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, tokens, weights)
    mesh = make_mesh(**axes, explicit=explicit)
    layout = shardings({"embedding/embedding": table}, mesh)["embedding/embedding"]
    rows = batch_sharding(mesh)
    placed = jax.device_put((table, tokens, weights), (layout, rows, rows))
    unknown = jax.device_put(tokens.at[3, 5].set(V), rows)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*placed).compile()
        (_, x), gradient = step(*placed)
        outside = jax.jit(embed)(placed[0], unknown)
    np.testing.assert_array_equal(x, want[0][1])
    np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-6)
    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(*rows.spec, None)), 3)
    lost = np.isnan(outside).all(axis=-1)
    assert lost[3, 5] and lost.sum() == 1
    # Neither the batch nor a whole row of the table is gathered.
    assert not re.findall(rf"f32\[(?:{B},{T}|\d+),{D}\]\S* all-gather", str(step.as_text()))
