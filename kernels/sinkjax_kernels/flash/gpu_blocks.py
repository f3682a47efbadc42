"""Tile sizes of the GPU kernels, per head size, for the 227 KiB of shared memory of an H100 or H200."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile: powers of two of at least 16, which is what Triton multiplies.

    Args:
        query, keys: rows and columns of a tile of scores.
        warps: groups of 32 threads of a program.
        stages: tiles of the loop that are in flight between global and shared memory.
    """

    query: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("query", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(
                    f"tile: expected {name} to be a power of two of at least 16, got {size}"
                )


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tiles of one call: forward, the gradient of queries, the gradients of keys and values.

    Args:
        chunk: query blocks that one program of the sink tokens' gradient sums up.
    """

    forward: Tile
    d_query: Tile
    d_keys: Tile
    chunk: int = 8


NARROW = 256
"""Windows up to this want small blocks: a block sees window + block, and hides what is too much."""

# The largest tiles of a few tried that the compiler fits into the registers of an H100 without spilling
# (at most some dozen bytes), with matrix units of 64 rows in use: by `ptxas -v` of what
# `test_flash_gpu.test_compiles` compiles. Which is fastest only a device can say.
_HALF = {
    64: Blocks(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Blocks(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    256: Blocks(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# Three products of TF32 for one, and twice the bytes: float32 wants small tiles, and the backward pass of
# heads above 128 spills a kilobyte all the same.
_FLOAT32 = {
    64: Blocks(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    128: Blocks(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    256: Blocks(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}


def blocks_for(head: int, itemsize: int, window: int | None) -> Blocks:
    """Tiles for the wider of the two head sizes, and a window or None."""
    table = _FLOAT32 if itemsize == 4 else _HALF
    blocks = next(blocks for size, blocks in table.items() if head <= size)
    if window is None or window > NARROW:
        return blocks

    def small(tile: Tile) -> Tile:
        if max(tile.query, tile.keys) <= 64:
            return tile
        return dataclasses.replace(
            tile, query=min(tile.query, 64), keys=min(tile.keys, 64), warps=4
        )

    tiles = {name: small(getattr(blocks, name)) for name in ("forward", "d_query", "d_keys")}
    return dataclasses.replace(blocks, **tiles)
