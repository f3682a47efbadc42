"""The chunked loss, and that of whole logits, on meshes of 8 devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sinkjax.ops.head_loss import head_cross_entropy
from sinkjax.ops.losses import cross_entropy
from sinkjax.sharding import batch_sharding, constrain, make_mesh, shardings

B, T, D = 8, 12, 24


def _operands(V):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    targets, mask = rng.integers(0, V, (B, T)), rng.integers(0, 2, (B, T))
    return tuple(map(jnp.asarray, (np.float32(hidden), np.float32(kernel), targets, mask)))


def _whole(hidden, kernel, targets, mask):
    return cross_entropy(jnp.einsum("BTD,DV->BTV", hidden, kernel), targets, mask, 0.1)


def _chunked(hidden, kernel, targets, mask):
    return head_cross_entropy(hidden, kernel, targets, mask, 0.1, chunks=3)


def _close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("V", "axes", "explicit"),
    [
        (38, dict(data=4, model=2), True),
        (37, dict(data=2, sequence=2, model=2), False),  # the vocabulary is padded
        pytest.param(38, dict(data=2, expert=2, sequence=2), True, marks=pytest.mark.slow),
        pytest.param(37, dict(data=4, model=2), True, marks=pytest.mark.slow),
        pytest.param(38, dict(data=2, sequence=2, model=2), False, marks=pytest.mark.slow),
        pytest.param(38, dict(data=3, model=2), False, marks=pytest.mark.slow),  # rows stay whole
    ],
)
def test_chunks_on_a_mesh_equal_one_device(V, axes, explicit):
    operands = _operands(V)
    want = jax.jit(jax.value_and_grad(_whole, (0, 1), has_aux=True))(*operands)
    mesh = make_mesh(**axes, explicit=explicit)
    cut = batch_sharding(mesh) if B % axes["data"] == 0 else NamedSharding(mesh, PartitionSpec())
    layout = (cut, shardings({"head/kernel": operands[1]}, mesh)["head/kernel"], cut, cut)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(_chunked, (0, 1), has_aux=True))
        compiled = step.lower(*jax.device_put(operands, layout)).compile()
        got = compiled(*jax.device_put(operands, layout))
    _close(got, want)
    if explicit:
        assert got[1][1].sharding.spec == layout[1].spec
    # The tokens stay where they are: only the kernel is gathered.
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", str(compiled.as_text()))
    assert all(int(shape.split(",")[0]) <= D for shape in gathered)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_vocabulary_cut_over_model_is_not_gathered(explicit):
    hidden, kernel, targets, mask = _operands(38)
    want = _whole(hidden, kernel, targets, mask)
    mesh = make_mesh(4, 2, explicit=explicit)

    def loss(logits, targets, mask):
        logits = constrain(logits, PartitionSpec("data", None, "model"))
        return cross_entropy(logits, targets, mask, 0.1)

    with jax.set_mesh(mesh):
        logits = jax.device_put(
            jnp.einsum("BTD,DV->BTV", hidden, kernel),
            NamedSharding(mesh, PartitionSpec("data", None, "model")),
        )
        placed = jax.device_put((targets, mask), batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(logits, *placed).compile()
        got = step(logits, *placed)
    _close(got[0], want)
    assert "all-gather" not in str(step.as_text())
    assert got[1].sharding.is_equivalent_to(logits.sharding, 3)
