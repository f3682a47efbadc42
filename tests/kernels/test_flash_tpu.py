"""The TPU kernels without a TPU: semantics by interpretation, compilers ahead of time.

Conformance cases have one block; the cases here have several, where windows begin, move and end.
"""

import dataclasses
import functools
import importlib.util
import math
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
from sinkjax_kernels.flash import tpu_tiles as tiles
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
    "normalizer": ("softmax", "softmax1", "softmax_n(n=2.5)", "sigmoid(bias=-2.0)", "softpick")
    + ("relu(divisor=3.0)", "relu_softmax")
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
    conformance.check(functools.partial(pallas_tpu.attention, interpret=True), case)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Several query blocks of 256; sizes are pairwise distinct.

    Args:
        normalizer: a name, with sink logits beside it where it takes some and `sinks` says so.
        offset: keys before the first query.
        segments: lengths of the segments of each row; rows are filled up with padding, id 0.
    """

    T: int
    window: int | None = None
    sink_tokens: int = 0
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    value_dim: int = 24
    more_keys: int = 0
    soft_cap: float | None = None
    normalizer: str = "softmax"
    sinks: bool = True
    dtype: str = "float32"
    batch: int = 1
    offset: int = 0
    segments: tuple[tuple[int, ...], ...] | None = None
    blocks: Blocks = SMALL

    def __str__(self) -> str:
        plain = {f.name: f.default for f in dataclasses.fields(self)} | {"blocks": SMALL}
        told = {name: x for name, x in vars(self).items() if name in plain and x != plain[name]}
        told = {name: len(x) if name == "segments" else x for name, x in told.items()}
        if "blocks" in told:
            told["blocks"] = "wide" if self.blocks.wide_matmuls else "other"
        return "-".join(f"{name}={x}" for name, x in told.items()).replace(" ", "")

    @functools.cached_property
    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        (N, K), B, S = self.heads, self.batch, self.offset + self.T + self.more_keys

        def draw(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype))

        operands = {
            "query": draw(B, self.T, N, self.head_dim) * 2,
            "key": draw(B, S, K, self.head_dim),
            "value": draw(B, S, K, self.value_dim),
        }
        if self.sinks and self.described.takes_sinks:
            operands["sinks"] = rng.normal(size=N).astype(np.float32)
        return operands

    @property
    def described(self) -> normalizers.Normalizer:
        return normalizers.resolve(self.normalizer)

    @property
    def segment_ids(self) -> np.ndarray | None:
        if self.segments is None:
            return None
        ids = np.zeros((len(self.segments), self.T), np.int32)
        for row, lengths in zip(ids, self.segments, strict=True):
            row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) * 5 % 11 + 1, lengths)
        return ids

    @property
    def visibility(self) -> masks.Visibility:
        S = self.offset + self.T + self.more_keys
        ids = self.segment_ids
        return masks.build(
            (self.batch, self.T, S, self.heads[1]),
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            num_sink_tokens=self.sink_tokens,
            query_positions=np.arange(self.T) + self.offset if self.offset else None,
            query_segment_ids=ids,
            key_segment_ids=ids,
        )

    def results(self, attention, operands, **options) -> dict[str, jax.Array]:
        """out, lse and all gradients, the log-sum-exp's cotangent included."""
        rng = np.random.default_rng(1)
        (N, _), B = self.heads, self.batch
        visibility = self.visibility
        d_out = rng.normal(size=(B, self.T, N, self.value_dim))
        d_lse = rng.normal(size=(B, self.T, N))
        static = STATIC | {"logits_soft_cap": self.soft_cap, "normalizer": self.described}

        def loss(leaves):
            out, lse = attention(
                leaves["query"], leaves["key"], leaves["value"], None, None, visibility,
                leaves.get("sinks"), **static, **options,
            )  # fmt: skip
            total = (out * d_out).sum()
            return total if lse is None else total + (lse * d_lse).sum(), (out, lse)

        grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(operands)
        found = {"out": out} | {f"d_{name}": g for name, g in grads.items()}
        return found if lse is None else found | {"lse": lse}

    def check(self, interpret=True) -> None:
        options = {"blocks": self.blocks, "interpret": interpret}
        got = self.results(pallas_tpu.attention, self.operands, **options)
        with enable_x64():
            wide = {name: jnp.asarray(x, "float64") for name, x in self.operands.items()}
            want = {
                name: np.asarray(x) for name, x in self.results(reference.attention, wide).items()
            }
        assert got.keys() == want.keys()
        for name, x in got.items():
            conformance.assert_close(name, x, want[name], self.dtype)


MANY = (3, 40, 200, 1, 2, 5, 90, 17)  # several segments in a block, some shorter than their sinks
PROBLEMS = [
    # One program has a ramp, whole windows, a cut block, and segments, several of them in a block.
    Problem(701, window=200, sink_tokens=5, segments=(MANY, (290, 400)), batch=2),
    Problem(523, blocks=WIDE),  # causal: the loop and the diagonal
    Problem(901, window=600, sink_tokens=5, normalizer="softpick"),  # the loop from the window on
    Problem(701, window=200, sink_tokens=5, more_keys=9),
    Problem(901, window=600, sink_tokens=5),
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
    *(
        Problem(T, window=window, sink_tokens=tokens, normalizer=name, heads=(2, 1), **more)
        for name in ("sigmoid(bias=-2.0)", "relu(divisor=3.0)", "softpick", "relu_softmax")
        for T, window, tokens, more in (
            (523, None, 0, {"soft_cap": 1.5}),
            (701, 200, 5, {"blocks": WIDE}),
            (901, 600, 5, {"dtype": "bfloat16"}),
            (401, 150, 3, {"segments": ((30, 250, 100),)}),
        )
    ),
    Problem(523, segments=(MANY, (290, 233)), batch=2),  # causal in each segment: the loop
    Problem(523, segments=((500, 20),), blocks=WIDE, dtype="bfloat16"),
    Problem(901, window=600, sink_tokens=5, segments=((700, 150),), sinks=False),
    Problem(1100, window=600, sink_tokens=7, segments=((1, 1000, 60),), heads=(2, 2)),
    Problem(701, window=20, sink_tokens=3, segments=(MANY,), heads=(2, 2)),  # many windows a block
    Problem(640, window=150, segments=((256, 300),)),
    Problem(701, window=200, sink_tokens=128, segments=((400, 301),)),
    Problem(701, window=200, sink_tokens=5, segments=(MANY,), heads=(4, 1)),
    Problem(401, window=100, sink_tokens=5, offset=333, more_keys=7),
    Problem(390, window=100, sink_tokens=5, offset=70),
    Problem(390, window=600, sink_tokens=5, offset=700, heads=(2, 1)),
    Problem(390, offset=300, heads=(2, 1)),
    Problem(390, offset=300, blocks=WIDE, dtype="bfloat16", normalizer="softpick"),
    Problem(390, offset=299, normalizer="sigmoid(bias=-2.0)"),
    Problem(701, window=100, sink_tokens=5, heads=(8, 2)),  # all heads of a group in a step
    Problem(701, window=130, heads=(12, 2), blocks=WIDE),  # three of six
    Problem(500, window=129, sink_tokens=2, heads=(6, 2), head_dim=64, sinks=False),
]  # fmt: skip


@pytest.mark.parametrize(
    "problem", [*PROBLEMS[:3], *(pytest.param(p, marks=pytest.mark.slow) for p in PROBLEMS[3:])],
    ids=str,
)  # fmt: skip
def test_several_blocks(problem):
    problem.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        Problem(1100, blocks=WIDE),
        Problem(901, window=600, sink_tokens=5, segments=((700, 150),), normalizer="softpick"),
        Problem(390, window=600, sink_tokens=5, offset=700, heads=(2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "interpret", [True, pltpu.InterpretParams(detect_races=True)], ids=["", "races"]
)
def test_keys_that_do_not_fit_are_streamed(problem, interpret, monkeypatch, capfd):
    monkeypatch.setattr(tiles, "VMEM_BYTES", 1000)
    run = functools.partial(pallas_tpu.attention, blocks=problem.blocks, interpret=interpret)
    arrays = {name: jnp.asarray(x) for name, x in problem.operands.items()}
    q, k, v, s = (arrays.get(name) for name in ("query", "key", "value", "sinks"))
    static = STATIC | {"normalizer": problem.described}
    got, _ = jax.jit(lambda: run(q, k, v, None, None, problem.visibility, s, **static))()
    want, _ = reference.attention(q, k, v, None, None, problem.visibility, s, **static)
    conformance.assert_close("out", got, want, "float32")
    assert "RACE" not in capfd.readouterr().out


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
        problem.results(pallas_tpu.attention, problem.operands, blocks=tiny, interpret=params)
        return len(points), len(set(points))

    assert visited(256) == (2 * 2, 2)  # passes × blocks: the two heads share a step
    assert visited(512) == (2 * 4, 4)


@pytest.mark.slow
def test_under_vmap_and_remat():
    """The transformed call gives what the plain one does."""
    problem = dataclasses.replace(NARROW, batch=2)

    def run(query, key, value, sinks):
        return pallas_tpu.attention(
            query, key, value, None, None, problem.visibility, sinks,
            **STATIC, blocks=SMALL, interpret=True,
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

    def loss(query, key, value, ids):
        window = {"local_window_size": (long.window - 1, 0), "num_sink_tokens": 4}
        segments = {} if ids is None else {"query_segment_ids": ids, "key_segment_ids": ids}
        mask = masks.build((1, T, T, 2), is_causal=True, **window, **segments)
        out, _ = pallas_tpu.attention(query, key, value, None, None, mask, None, **STATIC)
        return out.sum()

    for ids in (None, jax.ShapeDtypeStruct((T,), jnp.int32)):
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape, ids)
        calls = {e.primitive.name for e in jaxpr.jaxpr.eqns}
        assert "pallas_call" in calls
        sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]
        assert max(sizes) == T * 2 * H


def test_queries_at_an_offset_cost_what_they_are():
    """A chunk of 1,024 queries at key 100,000: no more blocks than two, and no more keys than they see."""
    T, offset = 1024, 100_000
    key = jax.ShapeDtypeStruct((1, offset + T, 2, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((1, T, 2, 128), jnp.bfloat16)
    mask = masks.build(
        (1, T, offset + T, 2), is_causal=True, local_window_size=(1023, 0), num_sink_tokens=4,
        query_positions=np.arange(T) + offset,
    )  # fmt: skip

    def run(query, key):
        return pallas_tpu.attention(query, key, key, None, None, mask, None, **STATIC)[0]

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for param in equation.params.values():
                inner = getattr(param, "jaxpr", param)
                yield from equations(inner) if hasattr(inner, "eqns") else ()

    every = equations(jax.make_jaxpr(run)(query, key).jaxpr)
    call = next(e for e in every if e.primitive.name == "pallas_call")
    assert math.prod(call.params["grid_mapping"].grid) == 2 * 2
    assert max(v.aval.shape[2] for v in call.invars if v.aval.ndim == 4) <= 3 * 1024


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
    def shape(*sizes, dtype="float32"):
        return jax.ShapeDtypeStruct(sizes, dtype)

    q, k, v = shape(1, 131, 4, 16), shape(1, 131, 2, 16), shape(1, 131, 2, 24)
    segments = jnp.zeros(131, int)
    flags = jnp.arange(131) == 5

    def run(q=q, k=k, v=v, bias=None, mask=None, sinks=None, more={}, **visibility):  # noqa: B006
        visibility = {"is_causal": True, "local_window_size": (3, 0)} | visibility
        built = masks.build((1, q.shape[1], k.shape[1], 2), **visibility)
        return pallas_tpu.check(q, k, v, bias, mask, built, sinks, **(STATIC | more))

    packed = {"query_segment_ids": segments, "key_segment_ids": segments}
    run()
    run(**packed)
    run(num_sink_tokens=128, sinks=shape(4), more={"logits_soft_cap": 3.0})
    run(k=shape(1, 150, 2, 16), v=shape(1, 150, 2, 24), query_positions=np.arange(131) + 19)
    run(more={"normalizer": normalizers.Softpick(), "interpret": True}, q=shape(1, 7, 4, 16))
    refused = {
        "less than a tile": {"q": shape(1, 127, 4, 16)},
        "query_segment_ids and key_segment_ids are one array": packed
        | {"key_segment_ids": segments + 1},
        "at most 128 beside a window": {"num_sink_tokens": 129, "local_window_size": (0, 0)},
        "4 beside a window of 3 in packed rows": packed
        | {"num_sink_tokens": 4, "local_window_size": (2, 0)},
        "less|fewer keys.*150": {"query_positions": np.arange(131) + 19},
        "lengths": {"key_value_seq_lengths": jnp.array([3])},
        "not causal": {"is_causal": False},
        "query_positions": {"query_positions": jnp.arange(131) + 1},
        "key_positions": {"key_positions": jnp.arange(131)[::-1]},
        "sink tokens": {"key_is_sink": flags},
        "bias": {"bias": shape(1, 1, 131, 131)},
        "mask": {"mask": shape(1, 1, 131, 131, dtype="bool")},
        "per token": {"sinks": shape(1, 131, 4)},
        "entmax15": {"more": {"normalizer": normalizers.resolve("entmax15")}},
        "learned": {"more": {"normalizer_params": {"bias": shape(4)}}},
        "float16": {"q": shape(1, 131, 4, 16, dtype="float16")},
        "head size": {"q": shape(1, 131, 4, 257), "k": shape(1, 131, 2, 257)},
        "fewer keys": {"k": shape(1, 130, 2, 16), "v": shape(1, 130, 2, 24)},
    }
    for reason, options in refused.items():
        with pytest.raises(NotImplementedError, match=reason):
            run(**options)
    with pytest.raises(ValueError, match=r"\[1, 131, 4, 16\], \[1, 131, 3, 16\]"):
        run(k=shape(1, 131, 3, 16), v=shape(1, 131, 3, 16))
    with pytest.raises(NotImplementedError, match="less than a tile"):  # attention itself asks
        tiny = jnp.zeros((1, 13, 4, 16))
        mask = masks.build((1, 13, 13, 4), is_causal=True)
        pallas_tpu.attention(tiny, tiny, tiny, None, None, mask, None, **STATIC)


def test_blocks_are_multiples_of_the_tile():
    with pytest.raises(ValueError, match="rows.*multiple of 128.*100"):
        Blocks(rows=100)


def test_cases():
    assert len({c.name for c in CASES}) == len(CASES)
    assert case("gpt-oss-8k").window == 128
    with pytest.raises(ValueError, match="sink-window-8k"):
        case("sink-window")


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES = {  # (T, N, K, H, Hv), window, sink tokens, soft cap, dtype, and what else
    "sink-window": ((4096, 4, 2, 128, 128), 1024, 4, None, "bfloat16"),
    "wide": ((4096, 2, 2, 128, 128), 2200, 4, 20.0, "bfloat16"),
    "causal": ((4096, 4, 2, 128, 128), None, 0, None, "bfloat16"),
    "float32": ((2048, 4, 2, 128, 128), 256, 20, None, "float32"),
    "64": ((2048, 8, 1, 64, 64), 128, 4, None, "bfloat16"),
    "80": ((2000, 2, 2, 80, 80), 256, 4, None, "bfloat16"),
    "96": ((2048, 2, 2, 96, 96), None, 0, None, "bfloat16"),
    "192": ((2048, 2, 2, 192, 128), 512, 4, None, "bfloat16"),
    "256": ((2048, 2, 2, 256, 256), 512, 128, None, "bfloat16"),
    "long": ((65536, 2, 2, 128, 128), None, 0, None, "bfloat16"),
    "gpt-oss": ((2048, 16, 2, 64, 64), 128, 0, None, "bfloat16"),
    "packed": ((4096, 4, 2, 128, 128), 1024, 4, None, "bfloat16", "packed"),
    "packed-causal": ((2048, 2, 2, 128, 128), None, 0, 20.0, "bfloat16", "packed"),
    "packed-wide": ((4096, 2, 2, 64, 64), 2200, 4, None, "bfloat16", "packed"),
    "packed-float32": ((2048, 4, 2, 80, 96), 200, 5, None, "float32", "packed", "softpick"),
    "offset": ((1000, 2, 2, 128, 128), 1024, 4, None, "bfloat16", "offset"),
    "offset-causal": ((1000, 2, 2, 128, 128), None, 0, None, "bfloat16", "offset"),
    "softpick": ((2048, 2, 2, 128, 128), 512, 4, None, "bfloat16", "softpick"),
    "sigmoid": ((2048, 4, 2, 128, 128), 256, 4, None, "bfloat16", "sigmoid(bias=-7.0)"),
    "relu": ((2048, 2, 2, 64, 64), None, 0, 20.0, "bfloat16", "relu(divisor=5.0)"),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, name, monkeypatch):
    """Forward and backward, ahead of time; set ALLOW_MULTIPLE_LIBTPU_LOAD=1 for several processes."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    (T, N, K, H, Hv), window, sink_tokens, soft_cap, dtype, *more = SHAPES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    offset = 1500 if "offset" in more else 0
    normalizer = more[-1] if more and more[-1] not in ("offset", "packed") else "softmax"
    static = STATIC | {"logits_soft_cap": soft_cap, "normalizer": normalizers.resolve(normalizer)}

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def loss(query, key, value, sinks, ids):
        packed = {"query_segment_ids": ids, "key_segment_ids": ids} if "packed" in more else {}
        visibility = masks.build(
            (1, T, offset + T, K), is_causal=True, num_sink_tokens=sink_tokens,
            local_window_size=None if window is None else (window - 1, 0),
            query_positions=np.arange(T) + offset if offset else None, **packed,
        )  # fmt: skip
        out, lse = pallas_tpu.attention(
            query, key, value, None, None, visibility,
            sinks if static["normalizer"].takes_sinks else None,
            **static, blocks=BLOCKS[chip.partition(":")[0]],
        )  # fmt: skip
        return out.astype(jnp.float32).sum() + (0 if lse is None else lse.sum())

    arrays = shape(1, T, N, H), shape(1, offset + T, K, H), shape(1, offset + T, K, Hv)
    arrays += shape(N, dtype="float32"), shape(T, dtype="int32")
    jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile()
