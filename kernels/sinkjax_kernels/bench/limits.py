"""How many cycles the matrix units need at least, whatever the schedule."""

import numpy as np

from sinkjax_kernels.bench.chips import Tpu
from sinkjax_kernels.cases import Case

GRAIN = 128  # queries and keys of the smallest tile that a kernel skips
SINK_GRAIN = 16  # sink tokens come 16 at a time: rows of a bfloat16 register
OURS = {"forward": 2, "backward": 5}
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # it computes scores and dP twice
_OVER_HEAD = {"forward": 1, "backward": 2, "fwd": 1, "dq": 2, "dkv": 2}  # S = QKᵀ and dP = dO Vᵀ


def visible_pairs(case: Case) -> int:
    """Pairs of the 128 × 128 tiles that have a visible one, sink tokens outside the window by 16."""
    last = np.arange(-(-case.length // GRAIN))
    if case.window is None:
        return int((last + 1).sum()) * GRAIN**2
    first = np.maximum(last * GRAIN - (case.window - 1), 0) // GRAIN
    tiles = int((last - first + 1).sum()) * GRAIN**2
    sinks = -(-case.num_sink_tokens // SINK_GRAIN) * SINK_GRAIN
    return tiles + int((first > 0).sum()) * GRAIN * sinks


def cycles(chip: Tpu, pairs: int, head_dim: int, kernel: str) -> float:
    """Cycles of a kernel's matmuls over so many query-key pairs of one head.

    A matmul that sums over the head size leaves the rows of a matrix unit empty that a small head does
    not have; the others can be laid out to fill it.
    """
    matmuls = (OURS | SPLASH)[kernel]
    narrow = _OVER_HEAD[kernel]
    padded = -(-head_dim // chip.matrix_size) * chip.matrix_size
    flops = 2 * pairs * (narrow * padded + (matmuls - narrow) * head_dim)
    return flops / chip.flops_per_cycle


def capacity(chip: Tpu, matmuls: int) -> int:
    """FLOPs that so many matrix instructions of 16 rows can do."""
    return 2 * 16 * chip.matrix_size**2 * matmuls
