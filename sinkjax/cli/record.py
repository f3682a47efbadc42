"""What stands beside every number that a command writes down."""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sinkjax.files import write_whole
from sinkjax.strict_json import plain


def environment(seed: int | None, started: float, device: str | None = None) -> dict[str, Any]:
    """The circumstances of a result, for its JSON.

    Args:
      seed: of what was random, or of the run that is looked at; None if nothing was random.
      started: `time.perf_counter()` when the command began.
      device: what the result is about; None: what JAX finds here, which wakes its backends.

    Returns:
      `seed`; `versions` of sinkjax, jax, jaxlib, flax and python; `device`, number and kind;
      `seconds` since `started`; `peak_memory_bytes` of this process on the host, its whole life.
    """
    # Here, not above: `sinkjax --help` must not wait for them.
    import flax
    import jax

    if device is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        device = kind if len(devices) == 1 else f"{len(devices)} x {kind}"
    return {
        "seed": seed,
        "versions": {
            "sinkjax": version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """Most host memory that this process has held so far."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # getrusage(2): kilobytes, macOS bytes


def version() -> str:
    """The version of sinkjax, also in a checkout that is not installed."""
    return sys.modules["sinkjax"].__version__


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write strict, indented JSON, whole or not at all; a number that is not finite becomes null.

    Args:
      path: of the file; its folder is made if it is not there.
      data: nested mappings, sequences, numbers (numpy's and jax's too), texts, paths.

    Raises:
      OSError: it cannot be written; an older file under that name is untouched.
    """
    text = json.dumps(plain(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, text)
