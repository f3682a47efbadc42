"""What a chip can do: for limits of kernels, and to know on what a time was measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TensorCore and its share of the chip, for bfloat16.

    Args:
        topology: name for ahead-of-time compilation.
        kind: as `jax.Device.device_kind` begins.
        matrix_size: rows and columns of a matrix unit.
        flops_per_cycle: of all of them: a row of each per cycle, two on the larger ones.
        peak: bfloat16 FLOP/s.
        bandwidth: bytes/s of HBM.
        vmem: bytes.
        cores: that JAX sees as one device.
        branch_delay: bundles that run after a jump, taken or not; None is for each jump its own.
    """

    name: str
    topology: str
    kind: str
    matrix_size: int
    flops_per_cycle: int
    peak: float
    bandwidth: float
    vmem: int
    cores: int = 1
    branch_delay: int | None = 4


# `pltpu.get_tpu_info_for_chip`, and cloud.google.com/tpu/docs; one TensorCore of v5p and tpu7x, which
# have two to a chip.
TPUS: tuple[Tpu, ...] = (
    Tpu("v5e", "v5e:2x2", "TPU v5 lite", 128, 131072, 197e12, 819e9, 128 << 20),
    Tpu("v5p", "v5p:2x2x1", "TPU v5", 128, 131072, 229.5e12, 1.385e12, 64 << 20, cores=2),
    Tpu("v6e", "v6e:2x2", "TPU v6 lite", 256, 524288, 918e12, 1.64e12, 128 << 20),
    Tpu(
        "tpu7x",
        "tpu7x:2x2x1",
        "TPU7x",
        256,
        524288,
        1155e12,
        3.7e12,
        64 << 20,
        branch_delay=None,
    ),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates of a device, None where they are not known."""

    peak: float | None
    bandwidth: float | None


# Dense bfloat16 and HBM of NVIDIA's data sheets, by a part of `device_kind`; SXM where there are several.
_GPUS: dict[str, Limits] = {
    "A100": Limits(312e12, 2.039e12),
    "H100": Limits(989e12, 3.35e12),
    "H200": Limits(989e12, 4.8e12),
    "B200": Limits(2250e12, 8e12),
}


def tpu(name: str) -> Tpu:
    """The TPU of that name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    for known in TPUS:
        if known.name == name:
            return known
    raise ValueError(f"chip: expected one of {', '.join(c.name for c in TPUS)}, got {name!r}")


def limits(device_kind: str) -> Limits:
    """Rates of a device by what JAX calls it."""
    for part, known in _GPUS.items():
        if part in device_kind:
            return known
    # The longest beginning first: "TPU v5 lite" is not "TPU v5".
    for chip in sorted(TPUS, key=lambda c: -len(c.kind)):
        if device_kind.startswith(chip.kind):
            return Limits(chip.peak, chip.bandwidth)
    return Limits(None, None)
