"""What sharding means on one device; `tests/devices` has the rest."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from sinkjax.models.parameters import abstract, parameters
from sinkjax.models.presets import PRESETS
from sinkjax.sharding import (
    DECODER_RULES,
    FSDP,
    batch_sharding,
    constrain,
    laid_out_by_compiler,
    make_mesh,
    resident,
    shardings,
    take_rows,
)

P = PartitionSpec


def test_constrain_without_a_mesh_does_nothing() -> None:
    x = jnp.ones((2, 3))
    assert constrain(x, P("data", "model")) is x
    assert constrain(x, P("nowhere")) is x


def test_constrain_on_the_trivial_mesh_keeps_values() -> None:
    for explicit in (False, True):
        with jax.set_mesh(make_mesh(explicit=explicit)):
            x = constrain(jnp.arange(6.0).reshape(2, 3), P("data", "sequence"))
            assert x.sum() == 15


def test_an_unknown_axis_is_refused() -> None:
    with (
        jax.set_mesh(make_mesh()),
        pytest.raises(ValueError, match=r"spec: expected mesh axes among .*, got \['modle'\]"),
    ):
        constrain(jnp.ones(3), P("modle"))


def test_the_trivial_mesh_is_the_default() -> None:
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert batch_sharding(mesh).spec == P("data", None)


@pytest.mark.parametrize(
    ("data", "model", "name"), [(0, 1, "data"), (1, 0, "model"), (-2, 1, "data")]
)
def test_sizes_below_one_are_refused(data: int, model: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
        make_mesh(data, model)


def _mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


MESHES = (
    _mesh(data=8, model=1),
    _mesh(data=4, model=2),
    _mesh(data=1, model=16),
    _mesh(data=256, model=1),
    _mesh(data=32, model=4),
    _mesh(data=16, sequence=16, model=1),
    _mesh(data=2, sequence=4, model=4),
    _mesh(data=4, expert=32, model=1),
    _mesh(data=4, expert=8, model=4),
    _mesh(data=2, expert=4, sequence=4, model=2),
)
# Which of the meshes each preset refuses, and the parameter that it names first.
REFUSED = {
    "tiny": {
        1: "out",
        2: "out",
        3: "key",
        4: "out",
        5: "key",
        6: "out",
        7: "down",
        8: "out",
        9: "out",
    },
    "small": {2: "out"},
    "gpt2": {2: "out"},
    "mixtral-8x7b": {7: "experts/down"},
    "gpt-oss-20b": {3: "key", 5: "key"},
    "gpt-oss-120b": {3: "key", 5: "key"},
}


@functools.cache
def _parameters(name: str) -> dict[str, Any]:
    return parameters(abstract(PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_cut_over_every_axis_or_refused_by_name(name: str) -> None:
    params = _parameters(name)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    for i, mesh in enumerate(MESHES):
        refused = REFUSED.get(name, {}).get(i)
        if refused is not None:
            found = (
                rf"parameter blocks/0/\S*{refused}/kernel: expected dimension \d to be divisible"
            )
            with pytest.raises(ValueError, match=found):
                shardings(params, mesh)
            continue
        axes = {axis for axis, size in mesh.shape.items() if size > 1}
        placed = jax.tree.leaves(shardings(params, mesh))
        for leaf, layout in zip(jax.tree.leaves(params), placed, strict=True):
            entries = (e if isinstance(e, tuple) else (e,) for e in layout.spec)
            cut = {axis for entry in entries for axis in entry if mesh.shape.get(axis, 1) > 1}
            layout.shard_shape(leaf.shape)
            assert leaf.size <= 0.01 * total or cut == axes, (mesh, leaf.shape, layout.spec)


@pytest.mark.parametrize(("name", "size"), [("gpt2", 50257), ("small", 257)])
def test_a_vocabulary_that_does_not_divide_is_cut_along_the_width(name: str, size: int) -> None:
    params = _parameters(name)
    got = shardings(params, _mesh(data=4, sequence=2, model=2))
    table = params["embedding"]["embedding"]
    assert table.shape[0] == size
    assert got["embedding"]["embedding"].spec == P(None, ("data", "sequence", "model"))
    if "head" in got:
        assert got["head"]["kernel"].spec == P(("data", "sequence", "model"), None)


def test_without_explicit_axes_the_compiler_has_the_layout_anyway() -> None:
    x = jnp.arange(6.0)
    with jax.set_mesh(make_mesh()):
        assert laid_out_by_compiler(jnp.cumsum, P("data"), x).tolist() == jnp.cumsum(x).tolist()
    with jax.set_mesh(make_mesh(explicit=True)):
        assert laid_out_by_compiler(jnp.cumsum, P("data"), x).tolist() == jnp.cumsum(x).tolist()


def test_a_parameter_of_another_rank_is_named() -> None:
    params = {"blocks": {3: {"kernel": jnp.ones((2, 3)), "norm": {"scale": jnp.ones(5)}}}}
    rules = ((r"kernel$", P("data", None, "model")), (r"scale$", P(None)))
    with pytest.raises(ValueError, match=r"parameter blocks/3/kernel: expected 3 dimensions"):
        shardings(params, make_mesh(), rules)


def test_take_rows_clips_and_fills() -> None:
    table = jnp.arange(10.0).reshape(5, 2)
    assert take_rows(table, jnp.array([[4, 7]])).tolist() == [[[8, 9], [8, 9]]]
    assert bool(jnp.isnan(take_rows(table, jnp.array([7]), mode="fill")).all())


def test_resident_weights_are_cut_by_model_and_expert_alone() -> None:
    table = (
        (r"query$", P(FSDP, "model", None)),
        (r"table$", P(None, (*FSDP, "model"))),
        (r"experts$", P("expert", ("data", "sequence"), "model")),
    )
    assert [tuple(spec) for _, spec in resident(table)] == [
        (None, "model", None),
        (None, "model"),
        ("expert", None, "model"),
    ]
    assert [rule for rule, _ in resident()] == [rule for rule, _ in DECODER_RULES]
