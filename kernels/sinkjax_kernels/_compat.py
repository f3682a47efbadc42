"""The only file of sinkjax_kernels that asks for a version."""

import re

import jax

OLDEST_JAX = (0, 10)


def numbers(version: str) -> tuple[int, ...]:
    """`"0.12.0.1"` as numbers that compare.

    Example:
      >>> numbers("0.12.0.1") > numbers("0.10.2.dev3")
      True
    """
    return tuple(int(n) for n in re.findall(r"\d+", version.partition(".dev")[0]))


def check_jax(version: str = jax.__version__) -> None:
    """Refuses a jax in which the kernels would fail later and less clearly.

    Why: notebooks come with an old jax, and one that is already loaded survives its own upgrade.

    Args:
      version: of jax; the one that is loaded by default.

    Raises:
      ImportError: it is too old.
    """
    if numbers(version) < OLDEST_JAX:
        raise ImportError(
            f"sinkjax needs jax >= {'.'.join(map(str, OLDEST_JAX))}, got {version}; "
            "run `pip install -U jax flax` and restart Python"
        )
