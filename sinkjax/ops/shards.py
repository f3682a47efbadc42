"""Run a function of attention operands on each device's part of them, inside `jax.shard_map`.

Rows of the batch and heads do not see each other, so a mesh that cuts these needs no communication
here; and a kernel cannot be cut by the compiler, which knows nothing of what is in it. Tokens do see
each other: `sinkjax.ops.sequence` says how, where `sequence` cuts them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from sinkjax.sharding import ROWS, constrain


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the current mesh that no surrounding `jax.shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def per_shard(
    run: Callable[..., Any],
    arrays: Mapping[str, Any],
    letters: Mapping[str, str],
    results: Any,
    sizes: Mapping[str, int],
    *,
    may_repeat: bool = True,
) -> Any:
    """`run(arrays)`; on a mesh, each device for its own rows and heads.

    Args:
        arrays: operands by name, some of them trees of arrays.
        letters: by name of an operand, or of a leaf of one: a letter for each dimension, such as "BSKH";
            words for several ranks. A dimension of size 1 is shared by all.
        results: tree with the letters of what comes out.
        sizes: of B, N and K; what does not divide stays whole on every device. T and S only where
            `run` knows what to do with tokens that are cut over `sequence`.
        may_repeat: repeat key heads that the shards do not divide, so that each shard has its own.
    """
    free = free_axes()
    if not free:
        return run(arrays)
    K, shards = sizes["K"], free.get("model", 1)
    each = math.lcm(K, shards)
    copies = each // K if may_repeat and sizes["N"] % each == 0 else 1
    axis_of: dict[str, Any] = {}
    rows = tuple(name for name in ROWS if name in free)
    if rows and sizes["B"] % math.prod(free[name] for name in rows) == 0:
        axis_of["B"] = rows
    if "model" in free and sizes["N"] % shards == 0 and K * copies % shards == 0:
        axis_of |= {"N": "model", "K": "model"}
    for letter in "TS":
        if "sequence" in free and letter in sizes and sizes[letter] % free["sequence"] == 0:
            axis_of[letter] = "sequence"

    def spec(names: str, shape: tuple[int, ...]) -> PartitionSpec:
        axes = [
            axis_of.get(letter) if n != 1 else None for letter, n in zip(names, shape, strict=True)
        ]
        if axes.count("sequence") > 1:  # queries and keys in one array: it is cut by queries
            axes[names.index("S")] = None
        return PartitionSpec(*axes)

    def named(path, x) -> str:
        keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        known = next(letters[key] for key in reversed(keys) if key in letters)
        return next(word for word in known.split() if len(word) == x.ndim)

    def place(path, x):
        names = named(path, x)
        axis = names.find("K")
        if "K" in axis_of and copies > 1 and axis >= 0 and x.shape[axis] == K:
            x = jnp.repeat(x, copies, axis=axis)
        return constrain(x, spec(names, x.shape))

    placed = jax.tree_util.tree_map_with_path(place, arrays)
    layout = jax.tree_util.tree_map_with_path(lambda p, x: spec(named(p, x), x.shape), placed)
    return jax.shard_map(
        run,
        in_specs=(layout,),
        out_specs=jax.tree.map(lambda names: spec(names, (0,) * len(names)), results),
        axis_names=set(free),
    )(placed)
