"""What a chip can do at most: arithmetic, memory and links, from its maker's tables."""

import dataclasses

from sinkjax_kernels.devices import TPUS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip. JAX may see it as more than one device: per-device rates are a share.

    Args:
      name: such as "v5p".
      peak_flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s of it.
      ici_bandwidth: bytes/s that the chip sends to its neighbours over all links at once; it receives
        as much at the same time (what is published as bidirectional is twice this).
      links: how many neighbours share `ici_bandwidth`: 4 in a torus of two dimensions, 6 in one of
        three; 1 for a switch, behind which everybody is a neighbour at full rate.
      devices_per_chip: `jax.Device`s that share all of this.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    links: int
    devices_per_chip: int = 1

    @property
    def device_peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s of one `jax.Device`."""
        return self.peak_flops / self.devices_per_chip

    @property
    def device_hbm_bytes(self) -> int:
        """Memory of one `jax.Device`."""
        return self.hbm_bytes // self.devices_per_chip

    @property
    def device_hbm_bandwidth(self) -> float:
        """Bytes/s of the memory of one `jax.Device`."""
        return self.hbm_bandwidth / self.devices_per_chip

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s that one link carries in one direction."""
        return self.ici_bandwidth / self.links


_GIB = 1 << 30

# TPUs: "TPU v4" to "TPU7x" under cloud.google.com/tpu/docs, rows "Peak compute per chip (BF16)", "HBM
# capacity", "HBM bandwidth" and "Bidirectional ICI bandwidth per chip"; v4 and v5p appear as one device
# for both cores (megacore), tpu7x as two. GPUs: NVIDIA's data sheets of the SXM modules, dense; NVLink
# to a switch.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * _GIB, 1228e9, 300e9, 6),
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, 4),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 6),
        Chip("v6e", 918e12, 32 * _GIB, 1638e9, 400e9, 4),
        Chip("tpu7x", 2307e12, 192 * _GIB, 7380e9, 600e9, 6, devices_per_chip=2),
        Chip("h100", 989e12, 80 * _GIB, 3350e9, 450e9, 1),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, 1),
    )
}
"""Chips by name."""

_KINDS = {
    **TPUS,
    "TPU v4": "v4",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a `jax.Device.device_kind`; None for one that is not in the table, as a CPU.

    >>> chip_of("TPU v5 lite").name
    'v5e'
    """
    return CHIPS.get(_KINDS.get(device_kind, ""))


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
      ValueError: there is none; the names are listed.
    """
    if name not in CHIPS:
        raise ValueError(f"chip: expected one of {', '.join(CHIPS)}; got {name!r}")
    return CHIPS[name]
