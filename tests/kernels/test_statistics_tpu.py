"""The TPU statistics without a TPU: semantics by interpretation, compilers ahead of time."""

import functools
import importlib.util
import math
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.statistics import pallas_tpu
from sinkjax_kernels.statistics.tpu_tour import tour_of

# Tests are no package: the cases are loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "statistics_cases", pathlib.Path(__file__).with_name("statistics_cases.py")
)
cases = sys.modules.setdefault("statistics_cases", importlib.util.module_from_spec(_SPEC))
if not hasattr(cases, "Problem"):
    _SPEC.loader.exec_module(cases)
Problem = cases.Problem

TINY = functools.partial(pallas_tpu.attention_statistics, blocks=(128, 128), interpret=True)


def _every(items, first: int):
    """The items, all but the first of them off by default."""
    return [
        pytest.param(x, id=str(x), marks=() if n < first else pytest.mark.slow)
        for n, x in enumerate(items)
    ]


@pytest.mark.parametrize("problem", _every(cases.SOME, 1))
def test_statistics(problem):
    problem.check(TINY, folds=True)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(256, 128), (128, 256), (384, 512), (512, 384)], ids=str)
@pytest.mark.parametrize("problem", cases.SOME[:9], ids=str)
def test_blocks_of_other_sizes(problem, blocks):
    problem.check(functools.partial(TINY, blocks=blocks), folds=True)


def test_no_races_and_every_step_of_the_grid(capfd):
    """Memory starts as NaN, a read out of bounds raises, a race is printed; grid points are counted."""
    points = []

    def record(token, point, core):
        points.append(tuple(map(int, point)))
        return token

    params = pltpu.InterpretParams(detect_races=True, grid_point_recorder=record)
    problem = Problem(384, window=100, sink_tokens=3, heads=(2, 1), head_dim=8)
    problem.check(functools.partial(TINY, interpret=params), folds=True)
    assert "RACE" not in capfd.readouterr().out
    rows, steps = tour_of(Ranges(100, 3), 384, 384, 128, 128).grid
    assert len(points) == 2 * 2 * rows * steps == 2 * 2 * 3 * 2  # passes × heads × blocks × steps


def test_grids():
    """Visited blocks double with T for a window, and hardly a step of causal attention is idle."""

    def steps(T, ranges, *blocks):
        rows, of_row = tour_of(ranges, T, T, *blocks).grid
        return rows * of_row

    window = Ranges(1024, 4)
    assert steps(131072, window, 512, 512) == 2 * steps(65536, window, 512, 512) == 256 * 3
    assert steps(131072, Ranges(), 512, 512) == 256 * 257 // 2
    assert steps(2560, Ranges(), 512, 512) == 15 + 3  # the block in the middle is alone in its row
    with pytest.raises(ValueError, match="multiples of 128, got 100"):
        steps(1024, window, 512, 100)


def test_no_square():
    """Of 131,072 tokens: nothing in the program is larger than the queries."""
    shape = jax.ShapeDtypeStruct((1, 131072, 2, 128), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 131072, 2), jnp.float32)

    def run(query, key, lse):
        visibility = masks.build((1, 131072, 131072, 2), is_causal=True)
        return pallas_tpu.attention_statistics(
            query, key, None, None, visibility, jnp.zeros(2), lse, **Problem(1).static
        )

    jaxpr = jax.make_jaxpr(run)(shape, shape, lse).jaxpr
    assert sum(e.primitive.name == "pallas_call" for e in jaxpr.eqns) == 2
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
    assert max(sizes) == math.prod(shape.shape)


def test_what_is_not_served_says_why():
    cases.check_refusals(pallas_tpu)
    with pytest.raises(NotImplementedError, match="VMEM"):
        shape = jax.ShapeDtypeStruct((1, 2**23, 2, 128), jnp.bfloat16)
        lse = jax.ShapeDtypeStruct((1, 2**23, 2), jnp.float32)
        visibility = Problem(131).visibility()  # its lengths are not looked at
        pallas_tpu.check(shape, shape, None, None, visibility, None, lse, **Problem(1).static)


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES = {  # (T, N, K, H), window, sink tokens, soft cap, segments, dtype
    "sink-window": ((131072, 2, 1, 128), 1024, 4, None, False, "bfloat16"),
    "causal": ((131072, 2, 2, 128), None, 0, None, False, "bfloat16"),
    "segments": ((8192, 2, 1, 64), 1024, 4, 20.0, True, "bfloat16"),
    "float32": ((2000, 4, 2, 80), 256, 130, None, False, "float32"),
    "256": ((2048, 2, 2, 256), None, 0, None, True, "float32"),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, name, monkeypatch):
    """Ahead of time, without an array of T · S; set ALLOW_MULTIPLE_LIBTPU_LOAD=1 for several processes."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    (T, N, K, H), window, sink_tokens, soft_cap, segments, dtype = SHAPES[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def run(query, key, sinks, lse, ids):
        packed = {"query_segment_ids": ids, "key_segment_ids": ids} if segments else {}
        visibility = masks.build(
            (1, T, T, K), is_causal=True, num_sink_tokens=sink_tokens,
            local_window_size=None if window is None else (window - 1, 0), **packed,
        )  # fmt: skip
        return pallas_tpu.attention_statistics(
            query, key, None, None, visibility, sinks, lse,
            normalizer=normalizers.Softmax(), scale=0.1, logits_soft_cap=soft_cap,
        )  # fmt: skip

    query, key = shape(1, T, N, H), shape(1, T, K, H)
    compiled = jax.jit(run).lower(
        query, key, shape(N, dtype="float32"), shape(1, T, N, dtype="float32"),
        shape(T, dtype="int32"),
    ).compile()  # fmt: skip
    sizes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    padded = -(-T // 1024) * 1024 * N * -(-H // 128) * 128
    assert max(math.prod(map(int, size.split(","))) for size in sizes) <= max(padded, T * N * 8)
    # Queries and keys with heads first, and the numbers of rows, each in tiles of 128 lanes.
    room = 2 * padded * jnp.dtype(dtype).itemsize + 2 * T * 128 * 4 + 64 * T * N
    assert compiled.memory_analysis().temp_size_in_bytes <= room
