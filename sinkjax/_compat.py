"""The only file of sinkjax that asks for a version; importing it refuses what cannot work.

Supported are two pairs, not a rectangle: jax 0.10 with flax 0.12.8 (Python 3.11), and jax >= 0.11.1
with flax >= 0.12.12 (Python >= 3.12). pip installs the broken combinations without a word.
"""

import importlib.metadata
from contextlib import AbstractContextManager

import jax

from sinkjax_kernels._compat import check_jax, numbers


def check_versions(jax_version: str, flax_version: str) -> None:
    """Refuses a pair of jax and flax that does not import, and says which does.

    Args:
      jax_version: as in `jax.__version__`.
      flax_version: as in `flax.__version__`.

    Raises:
      ImportError: jax is too old, or the two are not from the same stack.

    Example:
      >>> check_versions("0.12.0.1", "0.12.12")
    """
    check_jax(jax_version)
    jax_is, flax_is = numbers(jax_version), numbers(flax_version)
    older = jax_is < (0, 11) and (0, 12, 8) <= flax_is < (0, 12, 12)
    newer = jax_is >= (0, 11, 1) and flax_is >= (0, 12, 12)
    if not (older or newer):
        raise ImportError(
            "sinkjax needs jax 0.10 with flax 0.12.8, or jax >= 0.11.1 with flax >= 0.12.12 "
            f"(Python >= 3.12), got jax {jax_version} with flax {flax_version}; "
            "run `pip install -U jax flax` and restart Python"
        )


def enable_x64(enabled: bool = True) -> AbstractContextManager[None]:
    """float64 arrays inside the `with` block, in this thread only."""
    return jax.enable_x64(enabled)


# flax itself is not imported: what failed there would be reported instead of why.
check_versions(jax.__version__, importlib.metadata.version("flax"))
