"""The backward TPU kernels by themselves: policies, packed rows, folded heads.

What the forward pass would hand over, the logarithm of the denominator and D − dL, is computed here in
float64 by `flash.families` and the reference.
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
from sinkjax_kernels.cases import case
from sinkjax_kernels.flash import families, reference, segments, tpu_backward, tpu_policies
from sinkjax_kernels.flash import tpu_tiles as tiles
from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.flash.tpu_backward import backward, plan_of
from sinkjax_kernels.flash.tpu_blocks import BLOCKS, Blocks
from sinkjax_kernels.flash.tpu_tiles import Static

# Tests are no package: the suite is loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "conformance", pathlib.Path(__file__).with_name("conformance.py")
)
conformance = sys.modules.setdefault("conformance", importlib.util.module_from_spec(_SPEC))
if not hasattr(conformance, "CASES"):
    _SPEC.loader.exec_module(conformance)

SMALL = Blocks(chunk=128, query_backward=256, rows_backward=256, keys_backward=128)
WIDE = Blocks(
    chunk=256, query_backward=256, rows_backward=128, keys_backward=256, wide_matmuls=True
)
TINY = Blocks(chunk=128, query_backward=128, rows_backward=256)
SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Several query blocks; sizes are pairwise distinct. `cuts`: where segments begin, by batch row."""

    T: int
    window: int | None = None
    sink_tokens: int = 0
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    value_dim: int = 24
    normalizer: normalizers.Normalizer = normalizers.Softmax()
    soft_cap: float | None = None
    cuts: tuple[tuple[int, ...], ...] = ()
    dtype: str = "float32"
    blocks: Blocks = SMALL

    @property
    def static(self) -> Static:
        ranges = Ranges(self.window, self.sink_tokens, has_segments=bool(self.cuts))
        policy = tpu_policies.policy_of(self.normalizer)
        return Static(ranges, SCALE, self.soft_cap, self.has_sinks, self.blocks, True, policy)

    @property
    def has_sinks(self) -> bool:
        return isinstance(self.normalizer, normalizers.Softmax)

    @property
    def ids(self) -> np.ndarray | None:
        places = np.arange(self.T)
        if not self.cuts:
            return None
        return np.stack([np.searchsorted(c, places, side="right") for c in self.cuts])

    @functools.cached_property
    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        (N, K), B, T = self.heads, len(self.cuts) or 1, self.T
        shapes = {
            "query": (B, T, N, self.head_dim), "key": (B, T, K, self.head_dim),
            "value": (B, T, K, self.value_dim), "d_out": (B, T, N, self.value_dim),
        }  # fmt: skip
        drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        drawn["query"] *= 2
        return {name: np.array(jnp.asarray(x, self.dtype)) for name, x in drawn.items()}

    def expected(self):
        """Gradients by autodiff of the reference in float64, and the rows that the kernel gets."""
        rng = np.random.default_rng(1)
        (N, K), T = self.heads, self.T
        B = self.operands["query"].shape[0]
        sinks = rng.normal(size=N) if self.has_sinks else None
        d_lse = rng.normal(size=(B, T, N))
        options = {"scale": SCALE, "logits_soft_cap": self.soft_cap}
        family = families.family_of(self.normalizer)
        constant = normalizers.constant_sink(self.normalizer)

        @jax.jit  # op by op it takes seconds
        def run(query, key, value, d_out):
            ids = None if self.ids is None else jnp.asarray(self.ids)
            visibility = masks.build(
                (B, T, T, K), is_causal=True, query_segment_ids=ids, key_segment_ids=ids,
                local_window_size=None if self.window is None else (self.window - 1, 0),
                num_sink_tokens=self.sink_tokens,
            )  # fmt: skip
            given = None if sinks is None else jnp.asarray(sinks)

            def attention(*arrays):
                return reference.attention(
                    *arrays, None, None, visibility, given, normalizer=self.normalizer, **options
                )

            (out, lse), pull = jax.vjp(attention, query, key, value)
            slope = None if lse is None else jnp.asarray(d_lse)
            grads = dict(zip(("dq", "dk", "dv"), pull((d_out, slope)), strict=True))
            logits, where = reference.logits_and_mask(query, key, None, None, visibility, **options)
            rows = None if given is None else jnp.broadcast_to(given[:, None], (B, N, T))
            rows = rows if constant is None else jnp.full((B, N, T), constant)
            state, _, _ = family.absorb(family.start(rows, (B, N, T), "float64"), logits, where)
            delta = (d_out * out).sum(-1) - (0 if slope is None else slope)
            return grads, family.finish(state)[0], delta.swapaxes(1, 2)

        wide = {name: np.asarray(x, "float64") for name, x in self.operands.items()}
        return jax.tree.map(np.asarray, run(**wide))

    def run(self, static, log_denominator, delta):
        rows = [np.asarray(x, "float32")[:, :, None] for x in (log_denominator, delta)]
        if not static.policy.has_top:
            rows = [None, None]

        @jax.jit
        def run(rows, *operands):
            arrays = [x.swapaxes(1, 2) for x in operands]
            starts = None if self.ids is None else segments.starts_of(jnp.asarray(self.ids))
            found = backward(static, *arrays, *rows, starts)
            return dict(zip(("dq", "dk", "dv"), (x.swapaxes(1, 2) for x in found), strict=True))

        return run(rows, *self.operands.values())

    def check(self, interpret=True) -> None:
        with enable_x64():
            want, log_denominator, delta = self.expected()
        static = dataclasses.replace(self.static, interpret=interpret)
        for name, x in self.run(static, log_denominator, delta).items():
            conformance.assert_close(f"d_{name[1]}", x, want[name], self.dtype)


FOLDED = Problem(301, 100, 3, heads=(2, 1), cuts=((7, 9, 150),))  # packed too
PROBLEMS = {
    "sigmoid": Problem(203, heads=(1, 1), normalizer=normalizers.Sigmoid(bias=-1.3), blocks=TINY),
    "packed folded": dataclasses.replace(FOLDED, T=203, window=61, blocks=TINY),
    "sink tile beside block 0": Problem(701, 200, 5),
    "packed folded, larger": FOLDED,
    "eight heads": Problem(413, 128, 5, heads=(8, 1)),
    "three of nine heads": Problem(413, 120, 5, heads=(9, 1)),
    "wide folded": Problem(413, 100, 17, heads=(6, 2), blocks=WIDE),
    "softpick": Problem(701, 200, 5, normalizer=normalizers.Softpick()),
    "softpick loop": Problem(901, 600, 5, normalizer=normalizers.Softpick(), soft_cap=2.0),
    "relu_softmax": Problem(701, 300, 5, normalizer=normalizers.ReluSoftmax()),
    "relu": Problem(523, 100, 3, normalizer=normalizers.Relu(divisor=7.0)),
    "sigmoid loop": Problem(901, 600, 5, normalizer=normalizers.Sigmoid(), soft_cap=2.0),
    "softmax1": Problem(523, normalizer=normalizers.Softmax1(), blocks=WIDE),
    "packed": Problem(701, 200, 5, cuts=((13, 170, 470), (3, 600))),
    "packed turns": Problem(413, 100, 5, heads=(9, 1), cuts=((131,),)),
    "packed causal": Problem(523, cuts=((131, 256, 400),)),
    "packed loop": Problem(1101, 600, 5, cuts=((100, 1000), (257,))),
    "packed loop softpick": Problem(901, 600, 17, normalizer=normalizers.Softpick(), cuts=((30,),)),
    "packed tiny window": Problem(523, 20, 4, cuts=((2, 3, 200),)),
    "packed wide": Problem(701, 300, 20, cuts=((41,),), blocks=WIDE),
    "packed causal wide": Problem(523, cuts=((20, 500),), blocks=WIDE),
    "wide loop": Problem(901, 600, 5, heads=(2, 1), blocks=WIDE),
    "packed bfloat16": Problem(1290, 100, 4, cuts=((41,),), dtype="bfloat16"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if n < 2 else pytest.mark.slow)
             for n, name in enumerate(PROBLEMS)],
)  # fmt: skip
def test_gradients(name):
    PROBLEMS[name].check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed folded", "packed turns", "relu_softmax"])
def test_no_races_and_nothing_uninitialised(name, capfd):
    """Packed rows, folded heads, blocks by parts: memory starts as NaN, and a race is printed."""
    PROBLEMS[name].check(pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_skips_the_segments_before_a_block():
    """Keys of another segment, in chunks of their own, are not even read."""
    problem = Problem(
        512, heads=(1, 1), cuts=((256,),), blocks=Blocks(chunk=128, query_backward=128)
    )
    with enable_x64():
        want, log_denominator, delta = problem.expected()
    for name in ("key", "value"):
        problem.operands[name][:, :256] = np.nan
    got = problem.run(problem.static, log_denominator, delta)["dq"]
    np.testing.assert_allclose(got[:, 256:], want["dq"][:, 256:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softpick", "packed", "packed turns", "eight heads softpick"])
def test_blocks_by_parts(name, monkeypatch):
    """The program that long ones become."""
    monkeypatch.setattr(tpu_backward, "MOST_TILES", 0)
    problem = PROBLEMS[name.removesuffix(" softpick")]
    if "softpick" in name:
        problem = dataclasses.replace(problem, normalizer=normalizers.Softpick())
    assert plan_of(problem.static, problem.T, problem.heads[0] // problem.heads[1]).has_parts
    problem.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [Problem(701), Problem(901, 600, 5, cuts=((41,),)),
     Problem(1301, 600, 5, normalizer=normalizers.Softpick(), heads=(2, 1))],
    ids=["causal", "packed", "wide window"],
)  # fmt: skip
def test_keys_in_several_calls(problem, monkeypatch):
    """Keys that do not fit into VMEM are cut: each call has 256 of them."""
    monkeypatch.setattr(tiles, "VMEM_BYTES", 300 * 2 * 128 * 12 / 0.8)
    problem.check()


def test_plans():
    """Small windows fold the heads of a group; what elementwise weights do not need is not read."""

    def plan(name, chip):
        c = case(name)
        static = Static(c.ranges, 1.0, None, True, BLOCKS[chip])
        return plan_of(static, c.length, c.num_heads // c.num_kv_heads)

    assert plan("gpt-oss-8k", "v5e").heads == plan("gpt-oss-8k", "v6e").heads == 8
    assert plan("sink-window-8k", "v5e").heads == plan("causal-8k", "v5e").heads == 1
    problem = PROBLEMS["sigmoid"]
    arrays = [jnp.zeros(np.shape(x.swapaxes(1, 2))) for x in problem.operands.values()]
    jaxpr = jax.make_jaxpr(lambda *x: backward(problem.static, *x, None, None))(*arrays)
    call = next(e for e in jaxpr.jaxpr.eqns if e.primitive.name == "pallas_call")
    assert len(call.invars) == 4


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES = {  # (B, T, N, K, H), window, sink tokens, normaliser, packed
    "folded": ((1, 4096, 8, 1, 64), 128, 4, normalizers.Softmax(), False),
    "folded turns": ((1, 4096, 16, 1, 128), 128, 4, normalizers.Softmax(), False),
    "folded 256": ((1, 4096, 4, 1, 128), 256, 20, normalizers.Softpick(), False),
    "packed folded": ((2, 4096, 8, 1, 64), 128, 4, normalizers.Softmax(), True),
    "long causal": ((1, 65536, 2, 2, 128), None, 0, normalizers.Softmax(), False),
    "long packed": ((1, 40000, 2, 2, 128), 2200, 4, normalizers.Softmax(), True),
    "packed": ((1, 4096, 2, 2, 128), 1024, 4, normalizers.Softmax(), True),
    "packed causal": ((2, 4096, 2, 1, 128), None, 0, normalizers.Softmax(), True),
    "packed wide": ((1, 4096, 2, 1, 128), 2200, 4, normalizers.Softpick(), True),
    "softpick": ((1, 4096, 2, 1, 128), 1024, 4, normalizers.Softpick(), False),
    "sigmoid": ((1, 4096, 2, 1, 128), 1024, 4, normalizers.Sigmoid(bias=-8.0), False),
    "relu": ((1, 4096, 2, 1, 128), None, 0, normalizers.Relu(divisor=9.0), False),
}


def _compiled(chip, shape, window, sink_tokens, normalizer, packed):
    B, T, N, K, H = shape
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    policy = tpu_policies.policy_of(normalizer)
    ranges = Ranges(window, sink_tokens, has_segments=packed)
    static = Static(ranges, SCALE, None, True, BLOCKS[chip.partition(":")[0]], False, policy)
    rows = [array(B, N, 1, T, dtype="float32") if policy.has_top else None] * 2
    arrays = [array(B, n, T, H) for n in (N, K, K, N)]
    starts = array(B, 1, T, dtype="int32") if packed else None
    return jax.jit(functools.partial(backward, static)).lower(*arrays, *rows, starts).compile()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, name, monkeypatch):
    """Ahead of time; set ALLOW_MULTIPLE_LIBTPU_LOAD=1 for several processes."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    _compiled(chip, *SHAPES[name])


@pytest.mark.tpu_aot
def test_memory(monkeypatch):
    """Of 32,768 tokens and 32 heads: little beside operands and results."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    long = ((1, 32768, 32, 8, 128), 1024, 4, normalizers.Softmax(), False)
    memory = _compiled("v5e:2x2", *long).memory_analysis()
    assert memory.temp_size_in_bytes <= 64 * 2**20
