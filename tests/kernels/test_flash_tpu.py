"""The TPU kernels without a TPU: semantics by interpretation, compilers ahead of time.

Conformance cases have one block; the cases here have several, where windows begin, move and end.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from sinkjax._compat import enable_x64
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.cases import CASES, case
from sinkjax_kernels.flash import pallas_tpu, reference
from sinkjax_kernels.flash.ranges import Ranges, ranges_of
from sinkjax_kernels.flash.tpu_blocks import BLOCKS, Blocks

# Tests are no package: the suite is loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "conformance", pathlib.Path(__file__).with_name("conformance.py")
)
conformance = sys.modules.setdefault("conformance", importlib.util.module_from_spec(_SPEC))
if not hasattr(conformance, "CASES"):
    _SPEC.loader.exec_module(conformance)

SMALL = Blocks(
    query=256, rows=128, keys=128, chunk=128,
    query_backward=256, rows_backward=256, keys_backward=128,
)  # fmt: skip
WIDE = Blocks(
    query=256, rows=256, keys=512, chunk=256,
    query_backward=256, rows_backward=128, keys_backward=256, wide_matmuls=True,
)  # fmt: skip
STATIC = {"normalizer": normalizers.Softmax(), "scale": 0.3, "logits_soft_cap": None}

_SERVED = {
    "normalizer": ("softmax", "softmax1", "softmax_n(n=2.5)")
    + tuple(("softmax", s) for s in conformance.SINK_LOGITS),
    "heads": conformance.OPTIONS["heads"],
    "mask": ("causal", "window 1", "window 4", "window > S"),
    "sink_tokens": (0, 2, "all"),
    "soft_cap": (None, 1.5),
    "dtype": ("float32", "bfloat16"),
}
ONE_BLOCK = [
    conformance.Case(
        **choice, places="index", lengths=False, bias=None, mask_array=None, seed=200 + n
    )
    for n, choice in enumerate(conformance.pairwise(_SERVED))
]


def some(items, every: int):
    """Each of the items, all but a few of them off by default."""
    return [
        pytest.param(x, id=str(x), marks=() if n % every == 0 else pytest.mark.slow)
        for n, x in enumerate(items)
    ]


@pytest.mark.parametrize("case", some(ONE_BLOCK, 15))
def test_conformance(case):
    known = ranges_of(case.operands[5])
    conformance.check(functools.partial(pallas_tpu.attention, ranges=known, interpret=True), case)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Several query blocks of 256; sizes are pairwise distinct."""

    T: int
    window: int | None = None
    sink_tokens: int = 0
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    value_dim: int = 24
    more_keys: int = 0
    soft_cap: float | None = None
    sinks: bool = True
    dtype: str = "float32"
    batch: int = 1
    blocks: Blocks = SMALL

    @functools.cached_property
    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        (N, K), B, S = self.heads, self.batch, self.T + self.more_keys

        def draw(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype))

        operands = {
            "query": draw(B, self.T, N, self.head_dim) * 2,
            "key": draw(B, S, K, self.head_dim),
            "value": draw(B, S, K, self.value_dim),
        }
        if self.sinks:
            operands["sinks"] = rng.normal(size=N).astype(np.float32)
        return operands

    @property
    def visibility(self) -> masks.Visibility:
        S = self.T + self.more_keys
        return masks.build(
            (self.batch, self.T, S, self.heads[1]),
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            num_sink_tokens=self.sink_tokens,
        )

    def results(self, attention, operands, **options) -> dict[str, jax.Array]:
        """out, lse and all gradients, the log-sum-exp's cotangent included."""
        rng = np.random.default_rng(1)
        (N, _), B = self.heads, self.batch
        visibility = self.visibility
        d_out = rng.normal(size=(B, self.T, N, self.value_dim))
        d_lse = rng.normal(size=(B, self.T, N))
        static = STATIC | {"logits_soft_cap": self.soft_cap}

        def loss(leaves):
            out, lse = attention(
                leaves["query"], leaves["key"], leaves["value"], None, None, visibility,
                leaves.get("sinks"), **static, **options,
            )  # fmt: skip
            return (out * d_out).sum() + (lse * d_lse).sum(), (out, lse)

        grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(operands)
        return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in grads.items()}

    def check(self, interpret=True) -> None:
        known = ranges_of(self.visibility)
        got = self.results(
            pallas_tpu.attention,
            self.operands,
            ranges=known,
            blocks=self.blocks,
            interpret=interpret,
        )
        with enable_x64():
            wide = {name: jnp.asarray(x, "float64") for name, x in self.operands.items()}
            want = {
                name: np.asarray(x) for name, x in self.results(reference.attention, wide).items()
            }
        assert got.keys() == want.keys()
        for name, x in got.items():
            conformance.assert_close(name, x, want[name], self.dtype)


PROBLEMS = [
    Problem(701, window=200, sink_tokens=5, more_keys=9),  # a ramp, whole windows, a cut block
    Problem(523, blocks=WIDE),  # causal: the loop and the diagonal
    Problem(901, window=600, sink_tokens=5),  # the loop from the edge of the window on
    Problem(300, window=130, sink_tokens=7, heads=(2, 2), soft_cap=2.0),
    Problem(701, window=1, sink_tokens=3, sinks=False),
    Problem(601, window=129, sink_tokens=17, heads=(3, 1), dtype="bfloat16", batch=2),
    Problem(601, window=129, sink_tokens=128, heads=(3, 3)),
    Problem(640, window=256, heads=(2, 2)),  # a window that ends with a tile
    Problem(640, window=257, sink_tokens=1),
    Problem(900, window=300, sink_tokens=20, heads=(4, 1), head_dim=80),
    Problem(1030, window=700, heads=(2, 1), soft_cap=2.0, dtype="bfloat16"),
    Problem(523, heads=(3, 1), dtype="bfloat16", sinks=False, batch=2),
    Problem(131, window=40, sink_tokens=4),
    Problem(523),
    Problem(701, window=200, sink_tokens=5, blocks=WIDE),
    Problem(1030, window=600, sink_tokens=128, value_dim=192, blocks=WIDE),
    Problem(1100, window=513, sink_tokens=4, heads=(2, 1), blocks=WIDE),
]


@pytest.mark.parametrize(
    "problem", [*PROBLEMS[:3], *(pytest.param(p, marks=pytest.mark.slow) for p in PROBLEMS[3:])],
    ids=lambda p: f"T{p.T}-W{p.window}-P{p.sink_tokens}-{p.dtype}" + "-wide" * p.blocks.wide_matmuls,
)  # fmt: skip
def test_several_blocks(problem):
    problem.check()


NARROW = Problem(384, window=100, sink_tokens=3, heads=(2, 1), head_dim=8, value_dim=8)


@pytest.mark.parametrize(
    "problem", [NARROW, pytest.param(dataclasses.replace(NARROW, window=None, sink_tokens=0),
                                     marks=pytest.mark.slow)],
    ids=["window", "causal"],
)  # fmt: skip
def test_no_races_and_nothing_uninitialised(problem, capfd):
    """Memory starts as NaN, a read out of bounds raises, and a race is printed."""
    problem.check(pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def test_visited_blocks_double_with_the_length():
    """Grid points of both passes; the tiles of one are the same for each but the first few blocks."""

    def visited(T):
        points = []

        def record(token, point, core):
            points.append(tuple(map(int, point)))
            return token

        params = pltpu.InterpretParams(grid_point_recorder=record)
        problem = dataclasses.replace(NARROW, T=T)
        tiny = Blocks(query=128, rows=128, keys=128, query_backward=128, rows_backward=128)
        problem.results(
            pallas_tpu.attention, problem.operands, ranges=Ranges(100, 3), blocks=tiny,
            interpret=params,
        )  # fmt: skip
        return len(points), len(set(points))

    assert visited(256) == (2 * 2 * 2, 2 * 2)  # passes × heads × blocks
    assert visited(512) == (2 * 2 * 4, 2 * 4)


@pytest.mark.slow
def test_under_vmap_and_remat():
    """The transformed call gives what the plain one does."""
    problem = dataclasses.replace(NARROW, batch=2)

    def run(query, key, value, sinks):
        return pallas_tpu.attention(
            query, key, value, None, None, None, sinks,
            **STATIC, ranges=Ranges(100, 3), blocks=SMALL, interpret=True,
        )[0]  # fmt: skip

    def slopes(run):
        return jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), argnums=(0, 1, 2, 3)))

    operands = [jnp.asarray(x) for x in problem.operands.values()]
    plain = slopes(run)(*operands)
    split = jax.vmap(lambda *x: run(*(y[None] for y in x[:3]), x[3])[0], in_axes=(0, 0, 0, None))
    for other in (jax.checkpoint(run), split):
        for a, b in zip(plain, slopes(other)(*operands), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_square_and_no_table():
    """Of 131,072 tokens: nothing in the program is larger than the padded operands."""
    long = case("sink-window-131k")
    T, H = long.length, long.head_dim
    shape = jax.ShapeDtypeStruct((1, T, 2, H), jnp.bfloat16)

    def loss(query, key, value):
        out, _ = pallas_tpu.attention(
            query, key, value, None, None, None, None, **STATIC, ranges=long.ranges
        )
        return out.sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape)
    calls = {e.primitive.name for e in jaxpr.jaxpr.eqns}
    assert "pallas_call" in calls
    sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]
    assert max(sizes) == T * 2 * H


def test_ranges():
    def of(**mask):
        return ranges_of(masks.build((2, 13, 17, 3), **mask))

    assert of(is_causal=True) == Ranges()
    assert of(is_causal=True, num_sink_tokens=2) == Ranges()  # all sees all: no window, no sinks
    assert of(is_causal=True, local_window_size=(3, 0)) == Ranges(4)
    assert of(is_causal=True, local_window_size=(3, 0), num_sink_tokens=2) == Ranges(4, 2)
    assert of(is_causal=True, query_positions=np.arange(13)) == Ranges()
    assert of(is_causal=True, query_positions=np.arange(13) + 4) == Ranges(offset=4)
    for length, window, sinks in [(13, 4, 2), (13, 4, 0), (13, 11, 2), (13, 10, 2), (13, 40, 0)]:
        mask = masks.build(
            (1, length, length, 1), is_causal=True, local_window_size=(window - 1, 0),
            num_sink_tokens=sinks,
        )  # fmt: skip
        assert Ranges(window, sinks).pairs(length) == int(mask.visible().sum())
    assert Ranges(11, 2).within(13) == Ranges() and Ranges(10, 2).within(13) == Ranges(10, 2)


def test_what_is_not_served_says_why():
    problem = Problem(13)
    q, k, v = (jnp.asarray(problem.operands[x]) for x in ("query", "key", "value"))
    segments = jnp.zeros(13, int)
    flags = jnp.arange(13) == 5

    def run(q=q, k=k, v=v, bias=None, mask=None, sinks=None, more={}, **visibility):  # noqa: B006
        visibility = {"is_causal": True, "local_window_size": (3, 0)} | visibility
        built = masks.build((1, q.shape[1], k.shape[1], 2), **visibility)
        return pallas_tpu.attention(q, k, v, bias, mask, built, sinks, **(STATIC | more))

    refused = {
        "segments": {"query_segment_ids": segments, "key_segment_ids": segments},
        "lengths": {"key_value_seq_lengths": jnp.array([3])},
        "not causal": {"is_causal": False},
        "query_positions": {"query_positions": jnp.arange(13) + 1},
        "key_positions": {"key_positions": jnp.arange(13)[::-1]},
        "sink tokens": {"key_is_sink": flags},
        "bias": {"bias": jnp.zeros((1, 1, 13, 13))},
        "mask": {"mask": jnp.ones((1, 1, 13, 13), bool)},
        "per token": {"sinks": jnp.zeros((1, 13, 4))},
        "softpick": {"more": {"normalizer": normalizers.Softpick()}},
        "float16": {"q": q.astype("float16"), "k": k.astype("float16"), "v": v.astype("float16")},
        "head size": {"q": jnp.zeros((1, 13, 4, 257)), "k": jnp.zeros((1, 13, 2, 257))},
        "fewer keys": {"k": k[:, :9], "v": v[:, :9]},
    }
    for reason, options in refused.items():
        with pytest.raises(NotImplementedError, match=reason):
            run(**options)
    with pytest.raises(NotImplementedError, match="VMEM"):
        causal = {"ranges": Ranges(), "interpret": True}
        wide = jnp.zeros((1, 65536, 4, 128), jnp.bfloat16)
        run(q=wide, k=wide[:, :, :2], v=wide[:, :, :2], more=causal, is_causal=False)
    with pytest.raises(ValueError, match=r"\[1, 13, 4, 16\], \[1, 13, 3, 16\]"):
        run(k=jnp.zeros((1, 13, 3, 16)), v=jnp.zeros((1, 13, 3, 16)))


def test_blocks_are_multiples_of_the_tile():
    with pytest.raises(ValueError, match="rows.*multiple of 128.*100"):
        Blocks(rows=100)


def test_cases():
    assert len({c.name for c in CASES}) == len(CASES)
    assert case("gpt-oss-8k").window == 128
    with pytest.raises(ValueError, match="sink-window-8k"):
        case("sink-window")


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES = {  # (T, N, K, H, Hv), window, sink tokens, soft cap, dtype
    "sink-window": ((4096, 4, 2, 128, 128), 1024, 4, None, "bfloat16"),
    "wide": ((4096, 2, 2, 128, 128), 2200, 4, 20.0, "bfloat16"),
    "causal": ((4096, 4, 2, 128, 128), None, 0, None, "bfloat16"),
    "float32": ((2048, 4, 2, 128, 128), 256, 20, None, "float32"),
    "64": ((2048, 8, 1, 64, 64), 128, 4, None, "bfloat16"),
    "80": ((2000, 2, 2, 80, 80), 256, 4, None, "bfloat16"),
    "96": ((2048, 2, 2, 96, 96), None, 0, None, "bfloat16"),
    "192": ((2048, 2, 2, 192, 128), 512, 4, None, "bfloat16"),
    "256": ((2048, 2, 2, 256, 256), 512, 128, None, "bfloat16"),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, name, monkeypatch):
    """Forward and backward, ahead of time; set ALLOW_MULTIPLE_LIBTPU_LOAD=1 for several processes."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    (T, N, K, H, Hv), window, sink_tokens, soft_cap, dtype = SHAPES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def loss(query, key, value, sinks):
        out, lse = pallas_tpu.attention(
            query, key, value, None, None, None, sinks,
            **STATIC | {"logits_soft_cap": soft_cap}, ranges=Ranges(window, sink_tokens),
            blocks=BLOCKS[chip.partition(":")[0]],
        )  # fmt: skip
        return out.astype(jnp.float32).sum() + lse.sum()

    arrays = shape(1, T, N, H), shape(1, T, K, H), shape(1, T, K, Hv), shape(N, dtype="float32")
    jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile()
