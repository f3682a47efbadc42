"""Layouts on explicit, automatic and manual meshes of 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sinkjax import ops
from sinkjax.sharding import (
    DECODER_RULES,
    batch_sharding,
    constrain,
    make_mesh,
    shardings,
    take_rows,
)

P = PartitionSpec


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


def test_mesh_takes_what_it_is_told() -> None:
    assert dict(make_mesh(2, 3).shape) == {"data": 2, "model": 3}
    assert dict(make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
    last = jax.devices()[5:]
    mesh = make_mesh(-1, 1, devices=last, explicit=True)
    assert list(mesh.devices.flat) == last
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(make_mesh(2).axis_types) == {AxisType.Auto}


def test_an_impossible_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 8 devices in all, got 3 x 3"):
        make_mesh(3, 3)
    with pytest.raises(ValueError, match="model: expected a divisor of 8 devices, got 3"):
        make_mesh(-1, 3)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_constrain_places(explicit: bool, jit: bool) -> None:
    mesh = make_mesh(4, 2, explicit=explicit)
    spec = P("data", None, ("sequence", "model"))
    x = jnp.arange(8 * 3 * 12.0).reshape(8, 3, 12)

    def place(x: jax.Array) -> jax.Array:
        return constrain(x, spec)

    with jax.set_mesh(mesh):
        got = (jax.jit(place) if jit else place)(x)
        moved = constrain(got, P(None, None, "data"))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "model")), x.ndim)
    assert moved.sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "data")), x.ndim)
    np.testing.assert_array_equal(got, x)


def test_constrain_serves_a_mesh_of_both_kinds() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    x = jnp.arange(48.0).reshape(8, 6)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: constrain(x, P("data", "model")))(x)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("manual", [{"data", "model"}, {"data"}])
def test_constrain_inside_shard_map(explicit: bool, manual: set[str]) -> None:
    mesh = make_mesh(4, 2, explicit=explicit)
    x = jnp.arange(48.0).reshape(8, 6)

    def body(shard: jax.Array) -> jax.Array:
        assert shard.shape[0] == 2
        return constrain(shard * 2, P("data", "model"))

    with jax.set_mesh(mesh):
        spec = P("data", "model" if "model" in manual else None)
        run = jax.shard_map(body, in_specs=spec, out_specs=spec, axis_names=manual)
        got = jax.jit(lambda x: run(constrain(x, spec)))(x)
    np.testing.assert_array_equal(got, x * 2)


def test_gradient_passes_constrain() -> None:
    x = jnp.arange(48.0).reshape(8, 6)
    for explicit in (False, True):
        with jax.set_mesh(make_mesh(4, 2, explicit=explicit)):
            got = jax.jit(jax.grad(lambda x: (constrain(x, P("data")) ** 2).sum()))(x)
        np.testing.assert_array_equal(got, 2 * x)


def decoder(layers: int | None, gate: str) -> dict:
    """Shapes of a decoder's parameters; `layers` stacks them as a scan does."""
    D, N, K, H, F, V = 24, 6, 2, 10, 12, 257

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        lead = () if layers is None else (layers,)
        return jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)

    block = {
        "attention_norm": {"scale": leaf(D)},
        "attention": {
            "query": {"kernel": leaf(D, N, H)},
            "key": {"kernel": leaf(D, K, H)},
            "out": {"kernel": leaf(N, H, D)},
            "sinks": leaf(N),
            "gate": {"kernel": leaf(D, N) if gate == "headwise" else leaf(D, N, H)},
            "query_norm": {"scale": leaf(H)},
        },
        "mlp": {"gate": {"kernel": leaf(D, F)}, "down": {"kernel": leaf(F, D)}},
    }
    whole = jax.ShapeDtypeStruct((V, D), jnp.float32)
    return {
        "embedding": {"embedding": whole},
        "blocks": {0: block},
        "head": {"kernel": jax.ShapeDtypeStruct((D, 258), jnp.float32)},
        "other": jax.ShapeDtypeStruct((5,), jnp.float32),
    }


@pytest.mark.parametrize("layers", [None, 4])
@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_rules_place_a_decoder_stacked_or_not(layers: int | None, gate: str) -> None:
    params = decoder(layers, gate)
    mesh = make_mesh(4, 2)
    got = shardings(params, mesh, DECODER_RULES)
    lead = () if layers is None else (None,)
    attention, mlp = got["blocks"][0]["attention"], got["blocks"][0]["mlp"]
    assert attention["query"]["kernel"].spec == P(*lead, "data", "model", None)
    assert attention["key"]["kernel"].spec == P(*lead, "data", "model", None)
    assert attention["out"]["kernel"].spec == P(*lead, "model", None, "data")
    assert attention["sinks"].spec == P(*lead, "model")
    tail = (None,) if gate == "elementwise" else ()
    assert attention["gate"]["kernel"].spec == P(*lead, "data", "model", *tail)
    assert attention["query_norm"]["scale"].spec == P(*lead, None)
    assert mlp["gate"]["kernel"].spec == P(*lead, "data", "model")
    assert mlp["down"]["kernel"].spec == P(*lead, "model", "data")
    assert got["embedding"]["embedding"].spec == P(None, ("data", "model"))
    assert got["head"]["kernel"].spec == P("data", "model")
    assert got["other"].spec == P()
    placed = jax.jit(
        lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params), out_shardings=got
    )()
    assert placed["blocks"][0]["mlp"]["down"]["kernel"].addressable_shards[0].data.shape[-2:] == (
        6,
        6,
    )


def test_fewer_key_heads_than_shards_are_cut_along_the_width() -> None:
    params = decoder(None, "headwise")
    key = params["blocks"][0]["attention"]["key"]
    got = shardings(params, make_mesh(2, 3))
    assert got["blocks"][0]["attention"]["key"]["kernel"].spec == P(("data", "model"), None, None)
    key["kernel"] = jax.ShapeDtypeStruct((8, 2, 10), jnp.float32)  # 8 is no multiple of 6
    got = shardings(params, make_mesh(2, 3))
    assert got["blocks"][0]["attention"]["key"]["kernel"].spec == P("data", None, None)


def test_rules_reach_the_optimiser_state() -> None:
    params = decoder(3, "headwise")
    got = shardings({"mu": params, "count": jax.ShapeDtypeStruct((), jnp.int32)}, make_mesh(4, 2))
    assert got["mu"]["blocks"][0]["attention"]["sinks"].spec == P(None, "model")
    assert got["count"].spec == P()


def test_a_dimension_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError) as error:
        shardings(decoder(None, "headwise"), make_mesh(1, 4))
    message = str(error.value)
    assert "parameter blocks/0/attention/" in message
    assert "expected dimension" in message and "divisible by 4 (mesh axis 'model')" in message
    assert "got size 6" in message


@pytest.mark.parametrize("explicit", [False, True])
def test_ops_run_sharded(explicit: bool) -> None:
    """One program over a sharded batch gives what one device gives."""
    B, T, N, H, V = 8, 5, 6, 10, 11
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (B, T, N, H))
    table = jax.random.normal(keys[1], (V, H))
    tokens = jax.random.randint(keys[2], (B, T), 0, V)
    positions = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) * 1_000_003

    def program(x: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = ops.rotate(x, positions, ops.Rope(H))
        x = ops.headwise_gate(x, x[..., 0])
        x = ops.rms_norm(x, jnp.ones(H))
        x = ops.swiglu(x, x).mean(axis=2) + take_rows(table, tokens)
        return ops.cross_entropy(jnp.einsum("BTH,VH->BTV", x, table), tokens, z_loss=0.1)[0]

    step = jax.value_and_grad(program)
    expected = jax.jit(step)(x, tokens, positions)
    mesh = make_mesh(4, 2, explicit=explicit)
    with jax.set_mesh(mesh):
        args = jax.device_put((x, tokens, positions), batch_sharding(mesh))
        got = jax.jit(step)(*args)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("explicit", [False, True])
def test_rope_runs_inside_shard_map(explicit: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 3, 2, 6))
    positions = jnp.arange(24, dtype=jnp.int32).reshape(8, 3) * 89_999_999
    rope = ops.Rope(6)
    mesh = make_mesh(4, 2, explicit=explicit)
    with jax.set_mesh(mesh):
        run = jax.shard_map(
            lambda x, p: ops.rotate(x, p, rope), in_specs=P("data"), out_specs=P("data")
        )
        args = jax.device_put((x, positions), batch_sharding(mesh))
        got = jax.jit(run)(*args)
    np.testing.assert_allclose(got, ops.rotate(x, positions, rope), atol=1e-6)
