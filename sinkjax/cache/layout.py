"""A cache on a mesh: what lies where, before a step and after it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jaxtyping import Array, Shaped

from sinkjax.sharding import cache_shardings, constrain


def keep_layout(cache: Any) -> Any:
    """Inside a program: the cache as `cache_shardings` lays it out on the current mesh.

    Why: a result of another layout than its argument could not lie in the argument's buffer, and the
    next step would be another program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache
    layout = cache_shardings(cache, mesh)
    return jax.tree.map(lambda leaf, place: constrain(leaf, place.spec), cache, layout)


def on_host(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """All of an array. Where other processes have parts of it, all processes must ask for it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def laid_out_as(like: Any, run: Callable[..., Any], *arrays: Any) -> Any:
    """`run(*arrays)`, where explicit axes are automatic ones inside, and results lie as `like`.

    Why: scatters into a ring and the sorts of score policies have no layout of their own on an
    explicit mesh and are refused. On every other mesh nothing changes.

    Args:
        like: tree of arrays, one for each result: its layout is the result's.
        run: of trees of arrays; it may use nothing else that lies on an explicit mesh.
        arrays: operands.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return run(*arrays)
    out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(run, axes=explicit, out_sharding=out)(*arrays)


def explicit_again(run: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """`run`, of one array that lies whole, for use inside `laid_out_as`: it may use what lies outside."""
    mesh = jax.sharding.get_abstract_mesh()
    if run is None or AxisType.Explicit not in mesh.axis_types:
        return run
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.explicit_axes(run, axes=explicit, in_sharding=jax.P())
