"""Tests in this folder see 8 CPU devices.

The number of devices is fixed when JAX starts, so they run in a process of their own:
`python -m pytest tests/devices`, which `tests/test_devices.py` starts for the whole suite.
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.devices)
