"""The GPU kernels without a GPU: semantics by interpretation, Triton's compiler ahead of time.

Tiles in the tests are small, so that windows, sink tokens and segments begin, move and end in several.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax._compat import enable_x64
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.cases import case
from sinkjax_kernels.flash import gpu_tiles, pallas_gpu, reference
from sinkjax_kernels.flash.gpu_blocks import Blocks, Tile, blocks_for
from sinkjax_kernels.flash.gpu_spans import Spans
from sinkjax_kernels.flash.ranges import Ranges, ranges_of

# Tests are no package: the suite is loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "conformance", pathlib.Path(__file__).with_name("conformance.py")
)
conformance = sys.modules.setdefault("conformance", importlib.util.module_from_spec(_SPEC))
if not hasattr(conformance, "CASES"):
    _SPEC.loader.exec_module(conformance)

SMALL = Blocks(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), chunk=2)
OTHER = Blocks(Tile(16, 64, 4, 2), Tile(64, 16, 4, 2), Tile(64, 16, 4, 2), chunk=3)
STATIC = {"normalizer": normalizers.Softmax(), "scale": 0.3, "logits_soft_cap": None}

_SERVED = {
    "normalizer": (*conformance.OPTIONS["normalizer"], "relu(divisor=3.0)"),
    "heads": conformance.OPTIONS["heads"],
    "mask": ("causal", "window 1", "window 4", "window > S"),
    "sink_tokens": (0, 2, "all"),
    "soft_cap": (None, 1.5),
    "dtype": ("float32", "bfloat16"),
}
ONE_BLOCK = [
    conformance.Case(
        **choice, places="index", lengths=False, bias=None, mask_array=None, seed=300 + n
    )
    for n, choice in enumerate(conformance.pairwise(_SERVED))
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_BLOCK, ids=str)
def test_conformance(case):
    conformance.check(functools.partial(pallas_gpu.attention, interpret=True), case)


PACKED = (
    (5, 60, 3, 70, 40, 23),  # lengths of the segments of each row
    (100, 1, 2, 98),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Several tiles; sizes are pairwise distinct."""

    T: int = 201
    window: int | None = None
    sink_tokens: int = 0
    offset: int = 0
    segments: tuple[tuple[int, ...], ...] | None = None
    normalizer: str = "softmax"
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    value_dim: int = 24
    more_keys: int = 0
    soft_cap: float | None = None
    scale: float = 0.3
    sinks: str | None = "per head"
    dtype: str = "float32"
    batch: int = 1
    blocks: Blocks = SMALL

    def __str__(self) -> str:
        return (
            "-".join(
                f"{f.name}={getattr(self, f.name)}".replace(" ", "")
                for f in dataclasses.fields(self)
                if f.name not in ("blocks", "segments") and getattr(self, f.name) != f.default
            )
            + ("-segments" if self.segments else "")
            + ("-other" if self.blocks == OTHER else "")
        )

    @property
    def keys(self) -> int:
        return self.T + self.offset + self.more_keys

    @functools.cached_property
    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        (N, K), B = self.heads, self.batch

        def draw(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype))

        operands = {
            "query": draw(B, self.T, N, self.head_dim) * 2,
            "key": draw(B, self.keys, K, self.head_dim),
            "value": draw(B, self.keys, K, self.value_dim),
        }
        if self.sinks:
            shape = (N,) if self.sinks == "per head" else (B, self.T, N)
            operands["sinks"] = rng.normal(size=shape).astype(np.float32)
        return operands

    @property
    def visibility(self) -> masks.Visibility:
        options = {}
        if self.segments:
            ids = jnp.asarray(np.stack([np.repeat(np.arange(len(s)), s) for s in self.segments]))
            options = {"query_segment_ids": ids, "key_segment_ids": ids}
        if self.offset:
            options["query_positions"] = np.arange(self.T) + self.offset
        return masks.build(
            (self.batch, self.T, self.keys, self.heads[1]),
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            num_sink_tokens=self.sink_tokens,
            **options,
        )

    def results(self, attention, operands, **options) -> dict[str, jax.Array]:
        """out, lse and all gradients, the log-sum-exp's cotangent included."""
        rng = np.random.default_rng(1)
        (N, _), B = self.heads, self.batch
        d_out = rng.normal(size=(B, self.T, N, self.value_dim))
        d_lse = rng.normal(size=(B, self.T, N))

        def loss(leaves):
            out, lse = attention(
                leaves["query"], leaves["key"], leaves["value"], None, None, self.visibility,
                leaves.get("sinks"), normalizer=normalizers.resolve(self.normalizer),
                scale=self.scale, logits_soft_cap=self.soft_cap, **options,
            )  # fmt: skip
            total = (out.astype(jnp.promote_types(out.dtype, "float32")) * d_out).sum()
            if lse is None:
                return total, {"out": out}
            return total + (lse * d_lse).sum(), {"out": out, "lse": lse}

        grads, values = jax.jit(jax.grad(loss, has_aux=True))(operands)
        return values | {f"d_{name}": g for name, g in grads.items()}

    def got(self) -> dict[str, jax.Array]:
        return self.results(pallas_gpu.attention, self.operands, blocks=self.blocks, interpret=True)

    def check(self) -> None:
        got = self.got()
        with enable_x64():
            wide = {name: jnp.asarray(x, "float64") for name, x in self.operands.items()}
            want = {
                name: np.asarray(x) for name, x in self.results(reference.attention, wide).items()
            }
        assert got.keys() == want.keys()
        for name, x in got.items():
            assert x.dtype == (self.operands | got)[name.removeprefix("d_")].dtype
            kind = "float32" if self.dtype == "float32" else "bfloat16"
            conformance.assert_close(name, x, want[name], kind)


QUICK = Problem(window=70, sink_tokens=5, segments=PACKED, batch=2, soft_cap=2.0)
PROBLEMS = [
    Problem(187, window=70, sink_tokens=19, offset=6, more_keys=3, soft_cap=2.0, blocks=OTHER),
    Problem(),
    Problem(blocks=OTHER, sinks=None, more_keys=5),
    Problem(window=40, sink_tokens=5, blocks=OTHER),
    Problem(window=1, sink_tokens=3, sinks=None),
    Problem(window=64, heads=(3, 1)),  # a window that ends with a tile
    Problem(window=65, sink_tokens=1, heads=(3, 3), sinks="per token", batch=2),
    Problem(window=20, sink_tokens=70),  # sink tokens in several tiles
    Problem(window=20, sink_tokens=70, blocks=OTHER, offset=3),
    Problem(window=20, sink_tokens=5, offset=90),  # keys that no query of theirs is near
    Problem(offset=90, dtype="bfloat16"),
    Problem(segments=PACKED, batch=2),
    Problem(segments=PACKED, batch=2, window=20, sink_tokens=5, blocks=OTHER),
    Problem(segments=PACKED, batch=2, window=20, sink_tokens=30, dtype="bfloat16"),
    Problem(segments=PACKED[:1], batch=2, window=70, sink_tokens=4, heads=(6, 2)),
    Problem(segments=((201,),), window=33, sink_tokens=4),
    Problem(segments=((160, 41),), window=4, sink_tokens=48, blocks=OTHER),  # sinks up to the end
    Problem(segments=((1,) * 201,), window=33, sink_tokens=4),
    Problem(window=40, sink_tokens=5, head_dim=80, value_dim=96, dtype="bfloat16"),
    Problem(window=40, sink_tokens=5, head_dim=20, value_dim=3, dtype="float16"),
    Problem(window=40, sink_tokens=5, scale=-0.3, soft_cap=1.5),
    Problem(window=40, sink_tokens=5, scale=0.0),
    Problem(window=40, sink_tokens=5, normalizer="softmax1", sinks=None, segments=PACKED, batch=2),
    Problem(window=40, sink_tokens=5, normalizer="sigmoid(bias=-2.0)", sinks=None),
    Problem(window=40, sink_tokens=5, normalizer="relu(divisor=3.0)", sinks=None, soft_cap=2.0),
    Problem(window=40, sink_tokens=5, normalizer="softpick", sinks=None, heads=(3, 1)),
    Problem(window=40, sink_tokens=5, normalizer="softpick", sinks=None, segments=PACKED, batch=2),
    Problem(normalizer="softpick(epsilon=0.0)", sinks=None, scale=0.0),  # all logits are 0
    Problem(normalizer="softpick", sinks=None, dtype="bfloat16", soft_cap=2.0),
    Problem(normalizer="sigmoid(bias=-2.0)", sinks=None, segments=PACKED, batch=2),
]


@pytest.mark.parametrize(
    "problem", [QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in PROBLEMS)], ids=str
)
def test_several_tiles(problem):
    problem.check()


@pytest.mark.slow
def test_the_same_each_time():
    first, second = QUICK.got(), QUICK.got()
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


SPANS = [
    Spans(Ranges(), 201, 201, Tile(32, 16, 4, 2)),
    Spans(Ranges(offset=37), 201, 250, Tile(16, 64, 4, 2)),
    Spans(Ranges(40, 5), 201, 207, Tile(32, 16, 4, 2)),
    Spans(Ranges(70, 19, offset=37), 192, 250, Tile(16, 32, 4, 2)),
    Spans(Ranges(7, 70, offset=120), 161, 281, Tile(64, 16, 4, 2)),
    Spans(Ranges(40, 5, has_segments=True), 201, 201, Tile(32, 16, 4, 2)),
    Spans(Ranges(15, 30, has_segments=True), 201, 201, Tile(16, 32, 4, 2)),
    Spans(Ranges(has_segments=True), 201, 201, Tile(16, 16, 4, 2)),
]


@pytest.mark.parametrize("spans", SPANS, ids=lambda s: f"{s.ranges}-{s.tile}")
def test_no_tile_is_missed_and_none_is_visited_in_vain(spans):
    """Against the mask: visible pairs are visited once, full tiles are full, empty ones skipped."""
    T, S, P, tile = spans.queries, spans.keys, spans.ranges.num_sink_tokens, spans.tile
    bq, bk = tile.query, tile.keys
    problem = Problem(
        T, spans.ranges.window, P, spans.ranges.offset, more_keys=S - T - spans.ranges.offset,
        segments=PACKED[:1] if spans.ranges.has_segments else None,
    )  # fmt: skip
    mask = np.asarray(problem.visibility.visible())[0, 0]
    starts, ends = np.zeros(S, int), np.full(S, T)
    if spans.ranges.has_segments:
        starts, ends = (
            np.asarray(x)[0] for x in pallas_gpu._segments(problem.visibility.query_segment_ids)
        )

    def tiles_of(rows, columns):
        """Some and all pairs of each tile, [rows / bq, columns / bk]; beyond the edge none is."""
        wide = np.zeros((-(-rows // bq) * bq, -(-columns // bk) * bk), bool)
        wide[:rows, :columns] = mask[:rows, :columns]
        wide = wide.reshape(wide.shape[0] // bq, bq, -1, bk)
        return wide.any((1, 3)), wide.all((1, 3))

    some, every = tiles_of(T, S)
    width = 16
    for i in range(spans.query_blocks):
        last = min((i + 1) * bq, T) - 1
        start = int(starts[i * bq])
        low, full_low, full_high, high = spans.of_query_block(i, start, int(starts[last]))
        count, end = spans.sink_tiles(low, start, width)
        before = np.arange(start, max(end, start))
        assert count == -(-len(before) // width)
        rows = slice(i * bq, last + 1)
        reached = np.zeros(S, bool)
        reached[before] = True
        reached[low * bk : high * bk] = True
        assert not mask[rows, ~reached].any()
        assert mask[rows, :][:, before].any(0).all()
        assert some[i, [low, high - 1]].all()
        assert mask[rows, full_low * bk : full_high * bk].all()
        if P == 0 and i < T // bq:  # sink tokens may fill a tile at the edge of the window
            assert full_high - full_low == every[i].sum()
    seen_far = np.zeros_like(mask)
    for j in range(spans.key_blocks):
        last = min((j + 1) * bk, S) - 1
        bounds = (int(ends[j * bk]), int(ends[last])) if spans.ranges.has_segments else ()
        low, full_low, full_high, high = spans.of_key_block(j, *bounds)
        near = np.zeros(T, bool)
        near[low * bq : high * bq] = True
        for k in range(j * bk, last + 1):
            if P:
                seen_far[min(T, spans.far(k) * bq) :, k] = True
            beyond = mask[:, k] & ~near
            assert not (beyond & ~seen_far[:, k]).any()
            assert not (mask[:, k] & near & seen_far[:, k]).any()
        assert every[full_low:full_high, j].all()
        if P == 0 and last - j * bk == bk - 1:
            assert full_high - full_low == every[:, j].sum()


@pytest.mark.slow
def test_visited_tiles_grow_with_the_length(monkeypatch):
    """Turns of all loops, as they run: a block more costs the same at any length."""
    turns = []
    loop = gpu_tiles.loop

    def counted(start, stop, body, carry):
        def turn(n, carry):
            jax.debug.callback(turns.append, n)
            return body(n, carry)

        return loop(start, stop, turn, carry)

    monkeypatch.setattr(gpu_tiles, "loop", counted)

    def visited(T):
        turns.clear()
        problem = Problem(T, 40, 5, heads=(2, 2), head_dim=4, value_dim=4, sinks=None)
        jax.block_until_ready(problem.got())
        jax.effects_barrier()
        return len(turns)

    few, twice, thrice = visited(128), visited(256), visited(384)
    assert thrice - twice == twice - few
    # Of 128 queries a head: 4 forward blocks of a sink tile and 5 tiles, 8 for d_query of 1 and 3 (the
    # run of 55 keys begins inside a tile of 32 in two ways), 4 key blocks of 5 and their 8 far tiles,
    # and the turns over one head of the 4 key blocks and 4 chunks.
    assert twice - few == 2 * (4 * (1 + 5) + 4 * (1 + 3) + 4 * (1 + 2) + 4 * 5 + 8 + 4 + 4)


def test_work_is_linear():
    """Tiles of all passes at the real sizes: twice the length is twice the tiles, the ramp aside."""

    def tiles(T, blocks, ranges):
        forward, d_query, d_keys = (
            Spans(ranges, T, T, tile) for tile in (blocks.forward, blocks.d_query, blocks.d_keys)
        )
        runs = [[s.of_query_block(i) for i in range(s.query_blocks)] for s in (forward, d_query)]
        runs.append([d_keys.of_key_block(j) for j in range(d_keys.key_blocks)])
        far = d_keys.query_blocks - d_keys.far(0)
        return np.array([*(sum(run[3] - run[0] for run in some) for some in runs), far])

    for name in ("sink-window-32k", "gpt-oss-8k"):
        known = case(name)
        ranges = dataclasses.replace(known.ranges, num_sink_tokens=4)
        blocks = blocks_for(known.head_dim, 2, known.window)
        counts = [tiles(n * 16384, blocks, ranges) for n in (1, 2, 3)]
        np.testing.assert_array_equal(counts[2] - counts[1], counts[1] - counts[0])
        np.testing.assert_allclose(counts[1] / counts[0], 2, rtol=0.05)


def test_no_square_and_no_table():
    """Of 131,072 packed tokens: nothing in the program is larger than a few times the operands."""
    long = case("sink-window-131k")
    T, H = long.length, long.head_dim
    shape = jax.ShapeDtypeStruct((1, T, 2, H), jnp.bfloat16)

    def loss(query, key, value, ids):
        visibility = masks.build(
            (1, T, T, 2), is_causal=True, local_window_size=(long.window - 1, 0),
            num_sink_tokens=long.num_sink_tokens, query_segment_ids=ids, key_segment_ids=ids,
        )  # fmt: skip
        out, _ = pallas_gpu.attention(query, key, value, None, None, visibility, None, **STATIC)
        return out.astype(jnp.float32).sum()

    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape, ids)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            if equation.primitive.name != "pallas_call":
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    yield from sizes(inner)

    assert max(sizes(jaxpr.jaxpr)) <= T * 2 * H


@pytest.mark.slow
def test_under_vmap_and_remat():
    """The transformed call gives what the plain one does."""
    problem = Problem(101, 40, 5, heads=(2, 1), batch=2)

    def run(query, key, value, sinks):
        visibility = dataclasses.replace(problem, batch=query.shape[0]).visibility
        return pallas_gpu.attention(
            query, key, value, None, None, visibility, sinks, **STATIC, blocks=SMALL, interpret=True
        )[0]

    def slopes(run):
        return jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), argnums=(0, 1, 2, 3)))

    operands = [jnp.asarray(x) for x in problem.operands.values()]
    plain = slopes(run)(*operands)
    split = jax.vmap(lambda *x: run(*(y[None] for y in x[:3]), x[3])[0], in_axes=(0, 0, 0, None))
    for other in (jax.checkpoint(run), split):
        for a, b in zip(plain, slopes(other)(*operands), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_ranges_of_what_is_served():
    visibility = Problem(window=40, sink_tokens=5, offset=6).visibility
    assert ranges_of(visibility) == Ranges(40, 5, offset=6)
    with pytest.raises(ValueError, match="keys.*power of two.*48"):
        Tile(64, 48, 4, 2)


def test_what_is_not_served_says_why():
    q, k, v = (jnp.zeros((1, 131, n, 16)) for n in (4, 2, 2))
    segments = jnp.zeros(131, int)

    def run(q=q, k=k, v=v, bias=None, mask=None, sinks=None, more={}, **visibility):  # noqa: B006
        visibility = {"is_causal": True, "local_window_size": (3, 0)} | visibility
        built = masks.build((q.shape[0], q.shape[1], k.shape[1], 2), **visibility)
        shapes = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
        pallas_gpu.check(*shapes, bias, mask, built, sinks, **(STATIC | more))
        return jax.eval_shape(
            lambda *x: pallas_gpu.attention(*x, bias, mask, built, sinks, **(STATIC | more)),
            q,
            k,
            v,
        )

    run()
    refused = {
        "segments": {"query_segment_ids": segments, "key_segment_ids": segments + 0},
        "lengths": {"key_value_seq_lengths": jnp.array([3])},
        "not causal": {"is_causal": False},
        "query_positions": {"query_positions": jnp.arange(131) + 1},
        "key_is_sink": {"key_is_sink": jnp.arange(131) == 5},
        "bias": {"bias": jnp.zeros((1, 1, 131, 131))},
        "mask": {"mask": jnp.ones((1, 1, 131, 131), bool)},
        "sigsoftmax": {"more": {"normalizer": normalizers.SigSoftmax()}},
        "learned leaves.*bias": {
            "more": {
                "normalizer": normalizers.Sigmoid(),
                "normalizer_params": {"bias": jnp.zeros(4)},
            }
        },
        "got float32, bfloat16, float32": {"k": k.astype("bfloat16")},
        "head size.*257": {"q": jnp.zeros((1, 131, 4, 257)), "k": jnp.zeros((1, 131, 2, 257))},
        "fewer keys": {"k": k[:, :9], "v": v[:, :9]},
        "127 queries are less than a tile": {"q": q[:, :127]},
        "batch and heads": {
            "q": jnp.zeros((16384, 131, 4, 1)),
            **{x: jnp.zeros((16384, 131, 2, 1)) for x in "kv"},
        },
    }
    for reason, options in refused.items():
        with pytest.raises(NotImplementedError, match=reason):
            run(**options)
    with pytest.raises(ValueError, match=r"\[1, 131, 4, 16\], \[1, 131, 3, 16\]"):
        run(k=jnp.zeros((1, 131, 3, 16)), v=jnp.zeros((1, 131, 3, 16)))
    with pytest.raises(ValueError, match=r"sinks.*\[4\].*got \[2\]"):
        run(sinks=jnp.zeros(2))
    with pytest.raises(ValueError, match="only softmax takes sink logits"):
        run(sinks=jnp.zeros(4), more={"normalizer": normalizers.Softpick()})


def loss_of(shapes, ranges, more, place=None, dtype="bfloat16", segments=True):
    """A loss over out and log-sum-exp, and the shapes of its operands."""
    T, N, K, H, Hv = shapes
    has_sinks = more.get("normalizer", STATIC["normalizer"]).takes_sinks

    def loss(query, key, value, sinks, ids):
        packed = {"query_segment_ids": ids, "key_segment_ids": ids} if segments else {}
        visibility = masks.build(
            (1, T, T, K), is_causal=True, num_sink_tokens=ranges.num_sink_tokens,
            local_window_size=None if ranges.window is None else (ranges.window - 1, 0), **packed,
        )  # fmt: skip
        out, lse = pallas_gpu.attention(
            query, key, value, None, None, visibility, sinks if has_sinks else None,
            **(STATIC | more),
        )  # fmt: skip
        total = out.astype(jnp.float32).sum()
        return total if lse is None else total + lse.sum()

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    operands = [shape(1, T, N, H), shape(1, T, K, H), shape(1, T, K, Hv)]
    operands += [shape(N, dtype="float32"), shape(1, T, dtype="int32")]
    return loss, operands


# jax 0.12 says so of all of Pallas-Triton, and has nothing that is interpreted and lowered in its place.
OF_JAX_12 = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


@OF_JAX_12
def test_lowers_for_triton_and_not_for_mosaic(placeless_h100):
    """Without CUDA: four kernels; inside `shard_map` they say how their outputs vary."""
    loss, operands = loss_of((256, 4, 2, 80, 48), Ranges(100, 4), {})
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    with placeless_h100():
        sharded = jax.shard_map(
            jax.grad(loss, argnums=(0, 1, 2, 3)),
            in_specs=(rows, rows, rows, whole, rows),
            out_specs=(rows, rows, rows, whole),
        )
        text = jax.jit(sharded).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4 and "mosaic" not in text


def _more(**more):
    return {n: normalizers.resolve(x) if n == "normalizer" else x for n, x in more.items()}


SHAPES = {  # (T, N, K, H, Hv), ranges, normaliser and soft cap, dtype, segments
    "sink-window": ((4096, 8, 2, 128, 128), Ranges(1024, 4), {}, "bfloat16", False),
    "packed": ((4096, 8, 2, 128, 128), Ranges(1024, 4), {}, "bfloat16", True),
    "causal": ((4096, 4, 4, 128, 128), Ranges(), {}, "bfloat16", False),
    "gpt-oss": ((2048, 8, 1, 64, 64), Ranges(128), {}, "bfloat16", False),
    "many sink tokens": ((2048, 4, 2, 64, 64), Ranges(300, 200), {}, "float16", True),
    "cap": ((2000, 4, 2, 128, 128), Ranges(512, 4), {"logits_soft_cap": 30.0}, "bfloat16", False),
    "16": ((1000, 2, 1, 16, 16), Ranges(64, 4), {}, "float16", False),
    "80": ((2000, 2, 2, 80, 80), Ranges(256, 4), {}, "bfloat16", False),
    "96": ((2048, 2, 2, 96, 96), Ranges(), {}, "float16", True),
    "192": ((2048, 2, 2, 192, 128), Ranges(512, 4), {}, "bfloat16", False),
    "256": ((2048, 2, 2, 256, 256), Ranges(512, 128), {}, "bfloat16", False),
    "float32 64": ((2048, 4, 2, 64, 64), Ranges(256, 20), {}, "float32", False),
    "float32 128": ((2048, 4, 2, 128, 128), Ranges(256, 20), {}, "float32", True),
    "float32 256": ((2048, 2, 1, 256, 256), Ranges(), {}, "float32", False),
} | {
    name: ((4096, 8, 2, 128, 128), Ranges(1024, 4), _more(normalizer=name), "bfloat16", False)
    for name in ("softmax1", "sigmoid(bias=-3.0)", "relu(divisor=9.0)", "softpick")
}


@OF_JAX_12
@pytest.mark.gpu_aot
@pytest.mark.parametrize("name", SHAPES)
def test_compiles(name, placeless_h100):
    """Forward and backward for an H100, with no GPU in the machine.

    Wants the extra `cuda`, JAX_PLATFORMS=cpu,cuda and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1.
    """
    shapes, ranges, more, dtype, segments = SHAPES[name]
    target = pathlib.Path(__file__).with_name("gpu_target_h100.txtpb").read_text()
    device = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=target, topology="1x1x1"
    ).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    loss, operands = loss_of(shapes, ranges, more, place, dtype, segments)
    slopes = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    with placeless_h100():
        compiled = jax.jit(slopes).lower(*operands).compile()
    text = compiled.as_text()
    kernels = ["forward", "d_query", "d_key_value"] + ["d_sink_tokens"] * bool(
        ranges.num_sink_tokens
    )
    for kernel in kernels:
        assert f"sinkjax_flash_{kernel}" in text, kernel
