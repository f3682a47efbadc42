"""The GPU statistics without a GPU: semantics by interpretation, and their lowering for CUDA."""

import functools
import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax_kernels import masks
from sinkjax_kernels.flash.gpu_blocks import Blocks, Tile
from sinkjax_kernels.statistics import pallas_gpu

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"  # jax 0.12
)

# Tests are no package: the cases are loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "statistics_cases", pathlib.Path(__file__).with_name("statistics_cases.py")
)
cases = sys.modules.setdefault("statistics_cases", importlib.util.module_from_spec(_SPEC))
if not hasattr(cases, "Problem"):
    _SPEC.loader.exec_module(cases)
Problem = cases.Problem

SMALL = Blocks(Tile(64, 32, 4, 2), Tile(16, 16, 4, 2), Tile(32, 64, 4, 2), chunk=3)
KERNEL = functools.partial(pallas_gpu.attention_statistics, blocks=SMALL, interpret=True)


def test_statistics():
    Problem(211, window=40, sink_tokens=5, more_keys=9, soft_cap=2.0).check(KERNEL, folds=False)


@pytest.mark.slow
@pytest.mark.parametrize("problem", cases.SOME, ids=str)
def test_more_statistics(problem):
    problem.check(KERNEL, folds=False)


@pytest.mark.slow
@pytest.mark.parametrize("problem", cases.SOME[:4], ids=str)
def test_blocks_by_default(problem):
    problem.check(functools.partial(KERNEL, blocks=None), folds=False)


def test_what_is_not_served_says_why():
    cases.check_refusals(pallas_gpu)


SHAPES = {  # (T, N, K, H), window, sink tokens, soft cap, segments, dtype
    "sink-window": ((131072, 2, 1, 128), 1024, 4, None, False, "bfloat16"),
    "causal": ((131072, 2, 2, 64), None, 0, None, False, "bfloat16"),
    "segments": ((8192, 2, 1, 80), 1024, 4, 20.0, True, "bfloat16"),
    "float32": ((2000, 4, 2, 256), 256, 130, None, False, "float32"),
}


def _program(name: str, place=None):
    """A call of 131,072 tokens or less as a function, and the shapes that it takes."""
    (T, N, K, H), window, sink_tokens, soft_cap, segments, dtype = SHAPES[name]

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def run(query, key, sinks, lse, ids):
        packed = {"query_segment_ids": ids, "key_segment_ids": ids} if segments else {}
        visibility = masks.build(
            (1, T, T, K), is_causal=True, num_sink_tokens=sink_tokens,
            local_window_size=None if window is None else (window - 1, 0), **packed,
        )  # fmt: skip
        return pallas_gpu.attention_statistics(
            query, key, None, None, visibility, sinks, lse,
            **Problem(1).static | {"logits_soft_cap": soft_cap},
        )  # fmt: skip

    return jax.jit(run), (
        shape(1, T, N, H), shape(1, T, K, H), shape(N, dtype="float32"),
        shape(1, T, N, dtype="float32"), shape(T, dtype="int32"),
    )  # fmt: skip


def test_lowers(placeless_h100):
    """Three Triton kernels: rows, keys, and far queries of sink tokens; `shard_map` accepts their outputs."""
    run, shapes = _program("sink-window")
    traced = run.trace(*shapes)
    sizes = [v.aval.size for e in traced.jaxpr.jaxpr.eqns for v in e.outvars]
    assert max(sizes) <= np.prod(shapes[0].shape)
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    with placeless_h100():
        sharded = jax.shard_map(run, in_specs=(rows, rows, whole, rows, whole), out_specs=rows)
        text = jax.jit(sharded).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3 and "mosaic" not in text


@pytest.mark.gpu_aot
@pytest.mark.parametrize("name", SHAPES)
def test_compiles(name, placeless_h100):
    """For an H100, with no GPU in the machine and no memory of its own beyond numbers of rows and keys.

    Wants the extra `cuda`, JAX_PLATFORMS=cpu,cuda and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1.
    """
    target = pathlib.Path(__file__).with_name("gpu_target_h100.txtpb").read_text()
    device = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=target, topology="1x1x1"
    ).devices[0]
    run, shapes = _program(name, jax.sharding.SingleDeviceSharding(device))
    with placeless_h100():
        compiled = run.lower(*shapes).compile()
    text, (_, T, N, _) = compiled.as_text(), shapes[0].shape
    for kernel in ("rows", "keys", *(["sink_tokens"] if SHAPES[name][2] else [])):
        assert f"sinkjax_statistics_{kernel}" in text
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * T * N + 2**20
