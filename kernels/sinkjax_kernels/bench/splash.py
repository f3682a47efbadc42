"""The baseline: `splash_attention` of the installed jax, for the masks of `cases.CASES`.

Its cost per head is

    steps × loop + active blocks × tile + rows × (first + last)

with a grid of rows × widest row of active blocks; which blocks are active is data to its kernels.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sinkjax_kernels.bench.llo import ScheduleError
from sinkjax_kernels.bench.walk import Walk
from sinkjax_kernels.cases import Case
from sinkjax_kernels.flash.ranges import Ranges

KERNELS = ("fwd", "dq", "dkv")
LARGEST_COMPUTE = 512
LONGEST = 32768  # preparing the mask takes O(T²) on the host: over 100 s at 131,072

Sizes = tuple[int, int]  # queries and keys of a block


class _SinkWindow(masks._ComputableMask):  # the only kind whose blocks are not stored
    def __init__(self, length: int, ranges: Ranges):
        self.ranges = ranges
        W, P = ranges.window, ranges.num_sink_tokens

        def seen(q, k):
            return (q >= k) if W is None else (q >= k) & ((q - k < W) | (k < P))

        super().__init__(shape=(length, length), mask_function=seen, shard_count=1)

    def __eq__(self, other):
        return isinstance(other, _SinkWindow) and (self.shape, self.ranges) == (
            other.shape,
            other.ranges,
        )

    def __hash__(self):
        return hash((self.shape, self.ranges))


def build(case: Case, sizes: Mapping[str, Sizes]) -> tuple[Any, float]:
    """`attend(query, key, value, sinks)` on `[N, T, H]`, and the seconds that its masks took."""
    if case.length > LONGEST:
        raise NotImplementedError(
            f"splash: masks of at most {LONGEST} tokens are prepared, got {case.length}"
        )
    start = time.perf_counter()
    named = {}
    for kernel, suffix in zip(KERNELS, ("", "_dq", "_dkv"), strict=True):
        queries, keys = sizes[kernel]
        named |= {f"block_q{suffix}": queries, f"block_kv{suffix}": keys}
        if kernel != "dq":
            named[f"block_kv{suffix}_compute"] = min(keys, LARGEST_COMPUTE)
    mask = _SinkWindow(case.length, case.ranges)
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * case.num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**named),
    )
    seconds = time.perf_counter() - start
    attend = jax.tree.map(np.asarray, attend)  # to be lowered for another device

    def call(query, key, value, sinks):
        return attend(query, key, value, None, sinks if case.has_sinks else None)

    return call, seconds


def active(ranges: Ranges, length: int, sizes: Sizes) -> np.ndarray:
    """Which blocks of queries × keys have a visible pair."""
    queries, keys = sizes
    i = np.arange(length // queries)[:, None]
    j = np.arange(length // keys)[None]
    where = (i + 1) * queries > j * keys
    if ranges.window is not None:
        near = i * queries - ((j + 1) * keys - 1) < ranges.window
        where &= near | (j * keys < ranges.num_sink_tokens)
    return where


@dataclasses.dataclass(frozen=True)
class Grid:
    """Of one kernel and head: grid steps, outer blocks with a first and a last step, active blocks."""

    steps: int
    rows: int
    blocks: int


def grid(ranges: Ranges, length: int, sizes: Sizes, kernel: str) -> Grid:
    where = active(ranges, length, sizes)
    if kernel == "dkv":
        where = where.T
    return Grid(len(where) * int(where.sum(1).max()), len(where), int(where.sum()))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bundles of the parts of one kernel: per step, per active block, and per row of a head.

    Heads that share keys share some of a row's, so `edge` need not be whole.
    """

    loop: float
    tile: float
    edge: float

    def cycles(self, grid: Grid) -> float:
        """Per head."""
        return grid.steps * self.loop + grid.blocks * self.tile + grid.rows * self.edge


def parts(walk: Walk, grid: Grid, heads: int, cores: int = 1) -> Parts:
    """Tells the parts of a splash kernel by how often they ran.

    Raises:
        ScheduleError: some part ran neither per step nor per row nor once, or the tile is not the one
            part that depends on data and has matrix work.
    """
    name = walk.program.name
    tiles = [p for p in walk.skipped if p.matmuls]
    if len(tiles) != 1 or len(walk.skipped) != 1 or walk.tiles:
        raise ScheduleError(
            f"{name}: expected one tile behind a branch on data, got {walk.skipped}, {walk.tiles}"
        )
    loop = edge = 0.0
    for part in walk.parts:
        # The pipeline takes two turns of the loop more, to fetch the first and to write the last.
        if heads * grid.steps <= part.runs <= heads * grid.steps + 2 * cores:
            loop += part.bundles
        elif part.runs <= cores:
            continue
        elif heads * grid.rows % part.runs == 0:
            edge += part.bundles * part.runs / (heads * grid.rows)
        else:
            raise ScheduleError(
                f"{name}: bundles {part.start:#x} to {part.end:#x} ran {part.runs} times; expected "
                f"{heads} heads × {grid.steps} steps or {grid.rows} rows"
            )
    return Parts(loop, float(tiles[0].bundles), edge)


def arguments(case: Case, shape) -> tuple:
    """query, key, value, sinks as splash takes them."""
    T, H = case.length, case.head_dim
    heads = [shape((n, T, H), jnp.bfloat16) for n in (case.num_heads, *[case.num_kv_heads] * 2)]
    return (*heads, shape((case.num_heads,), jnp.float32))
