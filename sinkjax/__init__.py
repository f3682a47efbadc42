"""Attention sinks in JAX: use them, understand them, remove them.

    ops       pure functions on arrays: attention with sinks, RoPE, norms, losses
    cache     KV caches that keep sinks and a window
    modules   Flax NNX modules, and the same for Linen
    models    decoders, presets, loading
    train     data, optimisers, the loop, checkpoints
    stream    generation without end on a constant cache
    diagnose  what the sinks of a model are, in numbers and pictures
    adapt     after training: which heads need all of a text
    plan      steps compiled for pods that are not there
    chips     what accelerators can do
    sharding  meshes and layouts
    typing    the letters of the shapes

`import sinkjax` loads `ops`; the rest is loaded when it is first named.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

# First: it refuses versions under which the rest would fail less clearly.
from sinkjax import _compat as _compat

from sinkjax import ops as ops
from sinkjax import sharding as sharding
from sinkjax.ops.attention import dot_product_attention as dot_product_attention

if TYPE_CHECKING:
    from sinkjax import adapt as adapt
    from sinkjax import cache as cache
    from sinkjax import chips as chips
    from sinkjax import diagnose as diagnose
    from sinkjax import models as models
    from sinkjax import modules as modules
    from sinkjax import plan as plan
    from sinkjax import stream as stream
    from sinkjax import train as train
    from sinkjax import typing as typing

__version__ = "0.1.0"

_ROOMS = (
    "adapt", "cache", "chips", "diagnose", "models", "modules", "plan", "stream", "train", "typing",
)  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name not in _ROOMS:
        raise AttributeError(f"module 'sinkjax' has no attribute {name!r}")
    return importlib.import_module(f"sinkjax.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
