"""Settings that every test shares.

`JAX_COMPILATION_CACHE_DIR` in the environment turns the persistent compilation cache on; it is
off otherwise, so that a run proves the whole path.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

# Before the first import of jax. Whoever tests an accelerator names it in the environment.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs run once or twice here: LLVM's slower passes would take longer than they save.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes of every annotated function are checked in tests, and nowhere else. Installed
# here because `--jaxtyping-packages` (jaxtyping 0.3.11) cannot take two packages together with a
# type checker that has arguments: it cuts the list at its first comma. The numeric tower lets an
# int stand for a float, as every caller expects.
_CHECKED = ["sinkjax", "sinkjax_kernels"]
for _name in _CHECKED:
    if _name in sys.modules:
        raise RuntimeError(f"{_name} was imported before its shape checks were installed")
install_import_hook(_CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


# Files of few and long tests. First, so that no worker is left alone with one of them at the end.
_LONG = ("test_devices", "test_notebooks", "test_quickstart", "test_backcopy", "test_variants")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files stay together; the long ones come first."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 arrays inside the test."""
    from sinkjax._compat import enable_x64

    with enable_x64():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of seven small files to train on."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"attention sinks {i * i} " * 40)
    return folder


@pytest.fixture
def placeless_h100() -> Callable[[], AbstractContextManager]:
    """`with placeless_h100():` is what newer JAX asks before it lowers for a GPU that is not there."""
    import jax

    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    return lambda: jax.sharding.use_abstract_mesh(mesh)
