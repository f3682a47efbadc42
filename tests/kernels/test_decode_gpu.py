"""The GPU kernel of decode attention without a GPU: semantics by interpretation, compilers ahead of time."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax._compat import enable_x64
from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import int8, pallas_gpu, reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"  # jax 0.12
)
TARGET = pathlib.Path(__file__).with_name("gpu_target_h100.txtpb")
TOLERANCES = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest error over the largest magnitude, against float64 on the rounded inputs."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes are pairwise distinct; the slots of a ring lie in no order, some of them empty."""

    normalizer: str = "softmax"
    T: int = 1
    G: int = 3
    C: int = 203
    H: int = 20
    Hv: int = 24
    dtype: str = "float32"
    leaf: str = "float32"
    per_head: bool = False
    sink_slots: int = 0
    sink_query: bool = True
    window: int | None = 70
    soft_cap: float | None = None
    sinks: str | None = None
    split: int | None = 128
    learned: bool = False

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "plain"

    def call(self) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """query, key and value; arrays by name; options that are no arrays."""
        rng = np.random.default_rng(0)
        B, K, C, T = 2, 5, self.C, self.T
        N = K * self.G

        def draw(*shape, dtype=self.dtype):
            return jnp.asarray(rng.normal(size=shape), dtype)

        places = np.stack([np.stack([rng.permutation(C) for _ in range(K)]) for _ in range(B)])
        places[:, :, 7:11] = -1
        clock = np.stack([np.arange(C - T, C), np.arange(C // 3, C // 3 + T)])
        if T > 1:
            clock[1, 1] = -1  # padding
        leaves = [draw(B, K, C, width, dtype="float32") + 0.3 for width in (self.H, self.Hv)]
        arrays: dict[str, Any] = {}
        if self.leaf == "int8":
            leaves, scales = zip(*(int8.quantize(x) for x in leaves), strict=True)
            arrays = dict(zip(("key_scale", "value_scale"), scales, strict=True))
        else:
            leaves = [x.astype(self.leaf) for x in leaves]
        arrays |= {
            "query_positions": jnp.asarray(clock, jnp.int32),
            "key_positions": jnp.asarray(places if self.per_head else places[:, :1], jnp.int32),
        }
        query = 2 * draw(B, T, N, self.H)
        if self.sink_slots and self.sink_query:
            arrays["sink_query"] = draw(B, T, N, self.H)
        if self.sinks == "head":
            arrays["sinks"] = jnp.linspace(-30.0, 9.0, N)
        if self.sinks == "token":
            arrays["sinks"] = draw(B, T, N, dtype="float32")
        description = normalizers.resolve(self.normalizer)
        if self.learned:
            arrays["normalizer_params"] = {
                name: draw(N, dtype="float32") / 4 for name in description.parameters
            }
        options = {
            "normalizer": description,
            "scale": 0.3,
            "logits_soft_cap": self.soft_cap,
            "num_sink_slots": self.sink_slots,
            "num_sink_tokens": 5,
            "window": self.window,
        }
        return [query, *leaves], arrays, options

    def check(self) -> None:
        operands, arrays, options = self.call()
        run = jax.jit(
            lambda *x, **more: pallas_gpu.decode_attention(
                *x, **more, **options, split=self.split, interpret=True
            )
        )
        got = run(*operands, **arrays)
        with enable_x64():
            wide = jax.tree.map(
                lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype("float64"),
                (operands, arrays),
            )
            specification = jax.jit(
                lambda x, more: reference.decode_attention(*x, **more, **options)
            )
            want: Any = [
                None if x is None else np.asarray(x, np.float64) for x in specification(*wide)
            ]
        assert got[0].dtype == self.dtype and got[0].shape == want[0].shape
        assert (got[1] is None) == (want[1] is None)
        for a, b in zip(got, want, strict=True):
            if b is None:
                continue
            a = np.asarray(a, np.float64)
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
            a, b = a[np.isfinite(b)], b[np.isfinite(b)]
            assert np.abs(a - b).max() <= TOLERANCES[self.dtype] * max(np.abs(b).max(), 1e-2)
        if self.T > 1:
            assert (np.asarray(got[0])[1, 1] == 0).all()  # padding


FEW = [Problem(T=3, per_head=True, sink_slots=131, soft_cap=2.0, sinks="token")]
MORE = [
    Problem(),
    Problem("softpick", T=2, G=1, dtype="bfloat16", leaf="bfloat16", split=None),
    Problem("softmax1", dtype="bfloat16", leaf="int8", sink_slots=4),
    Problem(window=None, sinks="head", split=64),
    Problem(T=2, window=1, split=None),
    Problem(T=2, sink_slots=133, sink_query=False, window=20, split=64),
    Problem(C=256, H=32, Hv=16, split=64),  # no edge to mask
    Problem("softmax_n(n=2.5)", G=8, T=11, split=None),  # more rows than a program takes
    Problem(dtype="float16", leaf="float16", sinks="head", sink_slots=4),
    Problem(dtype="float16", leaf="int8", per_head=True),
    Problem(dtype="float32", leaf="int8", sink_slots=140, T=2),
    Problem(dtype="float32", leaf="bfloat16", H=80, Hv=96),
    Problem(dtype="bfloat16", leaf="float32", H=72, Hv=128),
    *(
        Problem(name, T=2, window=40 + 3 * n)
        for n, name in enumerate(
            (
                "sigsoftmax", "cog", "sigmoid(bias=-1.0)", "sigmoid(normalized=True)",
                "relu(divisor=2.0)", "relu(by_length=True)", "relu(normalized=True)", "elu",
                "elu(normalized=True)", "identity", "consmax", "rectified_only", "relu_softmax",
            )
        )
    ),
    Problem("sigmoid(bias=-1.0)", learned=True, dtype="float16", leaf="float16"),
    Problem("consmax(divisor=4.0)", learned=True, T=2),
]  # fmt: skip


@pytest.mark.parametrize(
    "problem", [*FEW, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE)], ids=str
)
def test_agrees_with_the_specification(problem):
    problem.check()


def test_blocks_that_nobody_sees_are_not_read():
    """NaN in them changes nothing: past the last slot in use, and between sinks and the window."""
    problem = Problem(C=523, H=64, Hv=64, split=256)
    operands, arrays, options = problem.call()
    query, key, value = operands
    # Blocks of 64 slots, splits of 256. Row 0: sinks, then a window of 70 up to slot 470; row 1: 40 slots.
    arrays["query_positions"] = jnp.array([[470], [39]])
    arrays["key_positions"] = jnp.broadcast_to(jnp.arange(523), (2, 1, 523))
    run = jax.jit(
        lambda *x: pallas_gpu.decode_attention(*x, **arrays, **options, split=256, interpret=True)[
            0
        ]
    )
    unseen = np.zeros((2, 523), bool)
    unseen[0, 64:384] = unseen[0, 512:] = unseen[1, 64:] = True
    unseen = jnp.asarray(unseen)[:, None, :, None]
    poisoned = [jnp.where(unseen, jnp.nan, x) for x in (key, value)]
    np.testing.assert_array_equal(run(query, key, value), run(query, *poisoned))


@pytest.mark.parametrize(
    "problem",
    [
        Problem("softmax1", dtype="bfloat16", leaf="int8"),
        pytest.param(Problem(sink_slots=4, sinks="head"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_step(problem):
    """The token is written where it belongs, or nowhere, and is seen."""
    (query, key, value), arrays, options = problem.call()
    rng = np.random.default_rng(1)
    new = [
        jnp.asarray(rng.normal(size=(2, 1, *x.shape[1::2])), problem.dtype) for x in (key, value)
    ]
    slots = jnp.array([9, -1])
    arrays["key_positions"] = arrays["key_positions"].at[0, :, 9].set(problem.C)
    arrays["query_positions"] = arrays["query_positions"].at[0].set(problem.C)
    got, want = (
        jax.jit(lambda *x, f=f, more=more: f(*x, slots=slots, **arrays, **options, **more))(
            query, *new, key, value
        )
        for f, more in (
            (pallas_gpu.decode_step, {"interpret": True}),
            (reference.decode_step, {}),
        )
    )
    tolerance = TOLERANCES[problem.dtype]
    np.testing.assert_allclose(
        np.asarray(got.out, np.float32), np.asarray(want.out, np.float32), atol=tolerance
    )
    np.testing.assert_allclose(got.lse, want.lse, atol=tolerance)
    for name in ("key", "value", "key_scale", "value_scale"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert (np.asarray(got.key)[0, :, 9] != np.asarray(key)[0, :, 9]).any()


def shapes(problem: Problem, **place):
    operands, arrays, options = jax.eval_shape(lambda: problem.call()[:2]), None, problem.call()[2]
    operands, arrays = operands
    as_placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, **place)  # noqa: E731
    return jax.tree.map(as_placed, operands), jax.tree.map(as_placed, arrays), options


LOWERED = [
    Problem(
        C=1028, H=128, Hv=128, G=8, dtype="bfloat16", leaf="bfloat16", sink_slots=4, split=None
    ),
    Problem(C=1028, H=128, Hv=128, G=8, dtype="bfloat16", leaf="int8", split=None),
    Problem(C=4100, H=64, Hv=64, sinks="head", soft_cap=30.0, split=None),
    Problem(C=1000, T=3, H=80, Hv=96, dtype="float16", leaf="float16", split=None),
    Problem(C=9001, H=192, Hv=128, dtype="float32", leaf="bfloat16", window=4096, split=None),
    Problem(C=1000, H=256, Hv=256, G=1, split=None),
    Problem("sigmoid(bias=-2.0)", C=1000, learned=True, per_head=True, split=None),
    Problem("softpick", C=1000, T=4, G=8, split=None),
    Problem("cog", C=1000, split=None),
    Problem("relu(by_length=True)", C=1000, dtype="float16", leaf="int8", split=None),
]


@pytest.mark.parametrize("problem", LOWERED[:2], ids=["in shard_map", "int8"])
def test_lowers_without_cuda(problem, placeless_h100):
    """One Triton call, whatever the splits; inside `shard_map` it says how its outputs vary."""
    operands, arrays, options = shapes(problem)

    def run(operands, arrays):
        return pallas_gpu.decode_attention(*operands, **arrays, **options)

    spec = jax.sharding.PartitionSpec("data")
    with placeless_h100():
        if problem is LOWERED[0]:
            run = jax.shard_map(run, in_specs=(spec, spec), out_specs=spec)
        lowered = jax.jit(run).trace(operands, arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") == 1


def test_splits():
    """Programs enough for a GPU, and none that is very short or very long."""
    for heads, slots in [
        (1, 100),
        (8, 1028),
        (8, 131_072),
        (64, 4100),
        (4096, 1028),
        (4096, 70_000),
    ]:
        size = pallas_gpu.split_of(heads, slots)
        parts = -(-slots // size)
        assert size <= pallas_gpu.LONGEST_SPLIT
        assert parts == 1 or size >= pallas_gpu.SHORTEST_SPLIT
        assert (
            heads * parts >= pallas_gpu.PROGRAMS
            or size < 2 * pallas_gpu.SHORTEST_SPLIT
            or (heads * (parts + 1) >= pallas_gpu.PROGRAMS)
        )


def test_what_is_not_served_says_why():
    problem = Problem()
    (query, key, value), arrays, options = problem.call()

    def check(**changes):
        given = {"query": query, "key": key, "value": value} | arrays | options | changes
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        pallas_gpu.check(q, k, v, **given)

    check()
    refused = {
        "several passes": {"normalizer": normalizers.resolve("entmax15")},
        "bias": {"bias": jnp.zeros((1, 1, 1, 203))},
        "mask": {"mask": jnp.ones((2, 1, 1, 203), bool)},
        "float64": {"query": jax.ShapeDtypeStruct(query.shape, "float64")},
        "at most 256, got 264": {
            "query": jnp.zeros((2, 1, 15, 264)), "key": jnp.zeros((2, 5, 203, 264))
        },
        "fewer than 128 slots, got 100": {
            "key": key[:, :, :100], "value": value[:, :, :100],
            "key_positions": arrays["key_positions"][..., :100],
        },
    }  # fmt: skip
    for reason, changes in refused.items():
        with pytest.raises(NotImplementedError, match=reason):
            check(**changes)
    wrong = {
        r"N a multiple of K, got \[2, 1, 14, 20\]": {"query": query[:, :, :14]},
        r"key_positions: expected \[2, 1, 203\]": {"key_positions": jnp.zeros((2, 3, 203), int)},
        r"sinks: expected \[15\]": {"sinks": jnp.zeros(5)},
        "only softmax takes": {
            "sinks": jnp.zeros(15), "normalizer": normalizers.resolve("softpick")
        },
        "need both": {"key_scale": jnp.ones((2, 5, 203))},
    }  # fmt: skip
    for reason, changes in wrong.items():
        with pytest.raises(ValueError, match=reason):
            check(**changes)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("problem", LOWERED, ids=str)
def test_compiles(problem, placeless_h100):
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    operands, arrays, options = shapes(problem, sharding=place)

    def run(operands, arrays):
        return pallas_gpu.decode_attention(*operands, **arrays, **options)

    with placeless_h100():
        program = jax.jit(run).lower(operands, arrays).compile()
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 4


@pytest.mark.gpu_aot
def test_step_writes_in_place(placeless_h100):
    """With donated leaves, no copy of the cache is made."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    operands, arrays, options = shapes(LOWERED[1], sharding=place)
    query, *leaves = operands
    arrays |= {"slots": jax.ShapeDtypeStruct((2,), "int32", sharding=place)}
    new = [
        jax.ShapeDtypeStruct((2, 1, *x.shape[1::2]), query.dtype, sharding=place) for x in leaves
    ]
    scales = {name: arrays.pop(name) for name in ("key_scale", "value_scale")}

    def run(leaves, scales, query, new, arrays):
        return pallas_gpu.decode_step(query, *new, *leaves, **arrays, **scales, **options)

    with placeless_h100():
        step = jax.jit(run, donate_argnums=(0, 1))
        program = step.lower(leaves, scales, query, new, arrays).compile()
    memory: Any = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size for x in leaves)
    assert memory.temp_size_in_bytes < leaves[0].size / 2
