"""On an older device the kernels step back; for another machine's nothing is known."""

import importlib.util
import types

import jax
import pytest

from sinkjax_kernels.devices import can_compile, check_device


@pytest.mark.parametrize(
    ("backend", "device", "platform", "refusal"),
    [
        ("tpu", {"device_kind": "TPU v6 lite"}, "tpu", None),
        ("tpu", {"device_kind": "TPU v3"}, "tpu", "v5e.*this is a TPU v3"),
        ("tpu", {"device_kind": "TPU v3"}, "cuda", None),
        ("gpu", {"device_kind": "H200", "compute_capability": "9.0"}, "cuda", None),
        (
            "gpu",
            {"device_kind": "Tesla T4", "compute_capability": "7.5"},
            "cuda",
            "8.0.*T4 has 7.5",
        ),
        ("cpu", {"device_kind": "cpu"}, "tpu", None),
    ],
)
def test_check_device(backend, device, platform, refusal, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**device)])
    if refusal is None:
        check_device(platform)
        return
    with pytest.raises(NotImplementedError, match=refusal):
        check_device(platform)


def test_can_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name))
    for platform in ("tpu", "cuda", "cpu"):
        assert not can_compile.__wrapped__(platform)
    assert asked == ["libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    assert can_compile.__wrapped__("tpu") and not can_compile.__wrapped__("cuda")
