"""Devices that the kernels are made for, and what this process can compile for."""

import functools
import importlib.util

import jax

TPUS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
"""Chip by what JAX calls a device."""

OLDEST_GPU = 8.0
"""Compute capability from which Triton compiles (Ampere)."""


_COMPILERS = {
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
}
"""Packages that compile for a platform, with or without a device."""


@functools.cache
def can_compile(platform: str) -> bool:
    """Whether this process can compile for a platform: its compiler is installed."""
    return any(importlib.util.find_spec(name) for name in _COMPILERS.get(platform, ()))


def check_device(platform: str) -> None:
    """Raises for a platform whose device on this machine cannot run the kernels.

    A machine without such a device may compile for another: nothing is known, so nothing is refused.

    Raises:
        NotImplementedError: names the device.
    """
    if {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) != platform:
        return
    device = jax.devices()[0]
    if platform == "tpu" and device.device_kind not in TPUS:
        raise NotImplementedError(
            f"kernels are made for {', '.join(sorted(set(TPUS.values())))}, this is a {device.device_kind}"
        )
    if platform == "cuda" and float(device.compute_capability) < OLDEST_GPU:
        raise NotImplementedError(
            f"kernels need compute capability {OLDEST_GPU}, this {device.device_kind} has "
            f"{device.compute_capability}"
        )
