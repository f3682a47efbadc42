"""A slice of TPU chips by name, such as `v5p:4x4x8`."""

import dataclasses
import math
import re

from sinkjax.chips import Chip, chip

# Chips that the TPU compiler has topologies of, by the dimensions of their torus.
_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a grid.

    Args:
      name: chip, a colon, sizes with an x between: `v5e:16x16`, `v5p:4x4x8`, `tpu7x:2x2x1`.

    Raises:
      ValueError: there is no such chip, or its grid has another number of dimensions.
    """

    name: str

    def __post_init__(self) -> None:
        kind, _, grid = self.name.partition(":")
        if kind not in _DIMENSIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid):
            raise ValueError(
                f"topology: expected one of {', '.join(_DIMENSIONS)}, a colon and the grid of its "
                f"chips, as in v5p:4x4x8; got {self.name!r}"
            )
        if len(self.grid) != _DIMENSIONS[kind]:
            raise ValueError(
                f"topology: expected {_DIMENSIONS[kind]} sizes for {kind}, got {self.name!r}"
            )

    @property
    def grid(self) -> tuple[int, ...]:
        """Chips along each dimension."""
        return tuple(int(size) for size in self.name.partition(":")[2].split("x"))

    @property
    def chip(self) -> Chip:
        """What one of them can do."""
        return chip(self.name.partition(":")[0])

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.grid)

    @property
    def devices(self) -> int:
        """How many `jax.Device`s; a tpu7x chip is two."""
        return self.chips * self.chip.devices_per_chip

    @property
    def wrap(self) -> list[bool]:
        """Which dimensions close to a ring.

        The compiler's own default is none. A slice that is made of whole cubes of 4 x 4 x 4 is a torus,
        and so is a pod of v5e or v6e along its 16. Without the rings the compiler of v5p gathers
        weights by adding up zeros, twice the bytes and nothing in parallel.

        Source: cloud.google.com/tpu/docs/v5p, /v5e, /v6e, "Topologies".
        """
        if len(self.grid) == 3:
            return [all(size % 4 == 0 for size in self.grid)] * 3
        return [*(size == 16 for size in self.grid), False]
