"""What sharding means on one device; `tests/devices` has the rest."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sinkjax.sharding import batch_sharding, constrain, make_mesh, shardings, take_rows

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
    assert batch_sharding(mesh).spec == P("data")


@pytest.mark.parametrize(
    ("data", "model", "name"), [(0, 1, "data"), (1, 0, "model"), (-2, 1, "data")]
)
def test_sizes_below_one_are_refused(data: int, model: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
        make_mesh(data, model)


def test_a_parameter_of_another_rank_is_named() -> None:
    params = {"blocks": {3: {"kernel": jnp.ones((2, 3)), "norm": {"scale": jnp.ones(5)}}}}
    rules = ((r"kernel$", P("data", None, "model")), (r"scale$", P(None)))
    with pytest.raises(ValueError, match=r"parameter blocks/3/kernel: expected 3 dimensions"):
        shardings(params, make_mesh(), rules)


def test_take_rows_clips_and_fills() -> None:
    table = jnp.arange(10.0).reshape(5, 2)
    assert take_rows(table, jnp.array([[4, 7]])).tolist() == [[[8, 9], [8, 9]]]
    assert bool(jnp.isnan(take_rows(table, jnp.array([7]), mode="fill")).all())
