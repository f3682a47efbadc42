"""Block sizes of the TPU kernels, and those of each chip."""

import dataclasses

import jax

from sinkjax_kernels.devices import TPUS


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes, all multiples of 128; shorter sequences use smaller ones.

    Args:
        query: queries of a grid step of the forward pass.
        rows: queries of a sub-block, whose scores are in flight together.
        keys: keys of one score matmul.
        chunk: keys of one turn of the loop where there is no narrow window.
        query_backward: queries of a grid step of the backward pass.
        rows_backward, keys_backward: queries and keys of one unit of the backward pass.
        wide_matmuls: for matrix units of 256 columns, which heads of 128 leave half empty: the sum of
            a row comes with its values, as one more column of ones, and dv is summed transposed.
    """

    query: int = 1024
    rows: int = 128
    keys: int = 256
    chunk: int = 1024
    query_backward: int = 512
    rows_backward: int = 512
    keys_backward: int = 128
    wide_matmuls: bool = False

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if name != "wide_matmuls" and (size < 128 or size % 128):
                raise ValueError(f"blocks: expected {name} to be a multiple of 128, got {size}")


BLOCKS: dict[str, Blocks] = {
    "v5e": Blocks(keys=1280),
    "v5p": Blocks(rows_backward=256),
    # A 256 × 256 matrix unit wants 256 rows.
    "v6e": Blocks(rows=256, keys=1280, query_backward=1024, keys_backward=256, wide_matmuls=True),
    "tpu7x": Blocks(rows=256, keys=1280, query_backward=1024, keys_backward=256, wide_matmuls=True),
}
"""Fewest static cycles of sink+window (P = 4, W = 1024) and of causal attention, N = 32, K = 8, H = 128,
bfloat16, T = 8192, of programs of at most 12,000 bundles: `python -m sinkjax_kernels.bench blocks`.
"""


def blocks_here() -> Blocks:
    """Those of the mesh in use or of the first device; where that is no known TPU, those of v5e.

    What a program is lowered for is not known while it is traced. The blocks of v5e are legal on all chips.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return BLOCKS[TPUS.get(device.device_kind, "v5e")]
