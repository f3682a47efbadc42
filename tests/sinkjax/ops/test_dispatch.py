"""One program, on each platform its own kernel; lowering needs neither the device nor its compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sinkjax.ops.attention import attention_statistics, dot_product_attention, resolve
from sinkjax.ops.decode import decode_attention
from sinkjax.ops.dispatch import Implementation, choose, dispatch

T, N, K, H = 131, 4, 2, 16
QUERY = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
KEY = jax.ShapeDtypeStruct((1, T, K, H), jnp.bfloat16)
MASK = {"is_causal": True, "local_window_size": (40, 0), "num_sink_tokens": 3}


def attend(query, key):
    return dot_product_attention(query, key, key, **MASK)


def measure(query, key):
    _, lse = dot_product_attention(query, key, key, **MASK, return_residual=True)
    return attention_statistics(query, key, lse=lse, **MASK).key_mass


def step(query, key):
    positions = jnp.arange(T)[None]
    leaf = key.swapaxes(1, 2)
    return decode_attention(query[:, -1:], leaf, leaf, query_positions=positions[:, -1:],
                            key_positions=positions)  # fmt: skip


def slope(query, key):
    return jax.grad(lambda q: attend(q, key).astype(jnp.float32).sum())(query)


def scanned(query, key):
    return jax.lax.scan(lambda q, _: (attend(q, key), None), query, length=2)[0]


@pytest.fixture
def compilers(monkeypatch):
    """As where every platform's compiler is installed."""
    monkeypatch.setattr("sinkjax.ops.dispatch.can_compile", lambda platform: True)


PROGRAMS = {
    "jit": (attend, 1),
    "grad": (slope, 2),
    "vmap": (lambda q, k: jax.vmap(attend, (0, None))(q[None], k), 1),
    "scan": (scanned, 1),
    "remat": (jax.checkpoint(slope), 2),
    "statistics": (measure, 2),
    "decode": (step, 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_platform_gets_its_kernel(name, compilers):
    run, calls = PROGRAMS[name]
    traced = jax.jit(run).trace(QUERY, KEY)
    for platform, on_tpu in {"tpu": calls, "cpu": 0}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("@tpu_custom_call") == on_tpu
        assert "triton" not in text


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", ["grad", "statistics", "decode"])
def test_a_gpu_gets_its_own(name, compilers, placeless_h100):
    with placeless_h100():
        traced = jax.jit(PROGRAMS[name][0]).trace(QUERY, KEY)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and "tpu_custom_call" not in text


def test_resolve_says_which():
    for platform, name in {"tpu": "pallas_tpu", "cuda": "pallas_gpu", "cpu": "xla"}.items():
        assert resolve(QUERY, KEY, KEY, **MASK, platform=platform) == name
    assert resolve(QUERY, KEY, KEY, **MASK) == "xla"  # this machine's
    # What the kernel refuses falls back, on every platform.
    assert resolve(QUERY, KEY, KEY, platform="tpu") == "xla"  # not causal
    assert resolve(QUERY, KEY, KEY, platform="cuda") == "cudnn"
    assert resolve(QUERY, KEY, KEY, **MASK, normalizer="entmax15", platform="tpu") == "rows"
    short = [jax.ShapeDtypeStruct((1, 13, n, H), jnp.bfloat16) for n in (N, K, K)]
    assert resolve(*short, **MASK, platform="tpu") == "xla"
    assert resolve(QUERY, KEY, KEY, **MASK, implementation="pallas_tpu") == "pallas_tpu"


def test_kernels_are_not_traced_where_nothing_compiles_them(monkeypatch):
    monkeypatch.setattr("sinkjax.ops.dispatch.can_compile", lambda platform: False)
    assert "pallas" not in str(jax.make_jaxpr(lambda *x: attend(*x))(QUERY, KEY))
    named = functools.partial(dot_product_attention, implementation=["pallas_tpu", "xla"], **MASK)
    assert "pallas" in str(jax.make_jaxpr(named)(QUERY, KEY, KEY))


def test_order_reasons_and_branches(compilers):
    def refuse(**call):
        raise NotImplementedError("never")

    def times(factor):
        return Implementation(lambda x, more: x * factor + more)

    table = {
        "only there": Implementation(lambda x, more: x * 7, platform="cpu"),
        "unable": Implementation(lambda x, more: x, refuse, platform="tpu"),
        "anywhere": times(3),
        "last": times(5),
    }
    call = {"x": jnp.arange(4.0)}
    run = jax.jit(lambda x: dispatch(table, None, {"x": x}, {"more": 1}))
    np.testing.assert_array_equal(run(call["x"]), call["x"] * 7)
    np.testing.assert_array_equal(dispatch(table, None, call, {"more": 1}), call["x"] * 7)
    np.testing.assert_array_equal(dispatch(table, ["last", "anywhere"], call, {"more": 1}),
                                  call["x"] * 5 + 1)  # fmt: skip
    options = call | {"more": 1}
    assert [choose(table, None, p, options) for p in ("cpu", "tpu")] == ["only there", "anywhere"]
    assert choose(table, "only there", "tpu", options) == "only there"
    with pytest.raises(NotImplementedError, match="never"):
        dispatch(table, "unable", call, {"more": 1})
    with pytest.raises(ValueError, match="implementation: expected one of .*'last'.* got 'first'"):
        choose(table, "first", "cpu", options)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_on_a_mesh_of_chips_each_runs_the_kernel_on_its_part(explicit, monkeypatch):
    """Inside `jax.shard_map` with `check_vma=True`; forward and backward move nothing but d_sinks."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.reshape(devices, (2, 2)), ("data", "model"), axis_types=(kind, kind))

    def shape(sizes, *spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def loss(query, key, sinks):
        out = dot_product_attention(query, key, key, sinks=sinks, **MASK)
        return out.astype(jnp.float32).sum()

    query, key = (shape((2, 512, n, 64), "data", None, "model") for n in (8, 4))
    sinks = shape((8,), "model", dtype=jnp.float32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, sinks).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 2
    assert (
        "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    )
