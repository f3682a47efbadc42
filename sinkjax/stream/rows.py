"""One row of a cache: written into it where it lies, and copied out of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sinkjax.cache import Cache
from sinkjax.sharding import cache_shardings
from sinkjax.stream.structure import Structure


@functools.lru_cache(maxsize=16)
def row_functions(structure: Structure) -> tuple[Callable[..., Cache], Callable[..., Cache]]:
    """`put(cache, one, row)`, the cache with this row and the others as they were, and
    `take(cache, row)`, a copy of one row. `put` is donated the cache.

    On a mesh the devices that have the row write their heads of it, and nothing moves. A row that is
    taken goes to all of them, its heads where they were.
    """

    def put(cache, one, row):
        def run(spec, leaf, new, row):
            at, mine = _local(spec, leaf, row)
            old = jax.lax.dynamic_index_in_dim(leaf, at, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(leaf, jnp.where(mine, new[0], old), at, 0)

        return _each_leaf(structure, run, (cache, one), cache, row)

    def take(cache, row):
        def run(spec, leaf, row):
            at, mine = _local(spec, leaf, row)
            found = jax.lax.dynamic_slice_in_dim(leaf, at, 1)
            if not _cut(spec):
                return found
            # As bits: a sum with zeros would turn -0 into 0.
            bits = jax.lax.bitcast_convert_type(found, f"uint{8 * found.dtype.itemsize}")
            bits = jax.lax.psum(jnp.where(mine, bits, 0), _cut(spec))
            return jax.lax.bitcast_convert_type(bits, found.dtype)

        one = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), cache
        )
        return _each_leaf(structure, run, (cache,), one, row)

    return structure.jit(put, donate_argnames=("cache",)), structure.jit(take)


def _each_leaf(structure: Structure, run, caches: tuple[Cache, ...], like: Cache, row) -> Cache:
    """`run(layout, *leaves, row)`, on a mesh by each device for its part; the result lies as `like`."""
    mesh, treedef = structure.mesh, jax.tree.structure(like)
    flat = [jax.tree.leaves(cache) for cache in caches]
    if mesh is None:
        whole = PartitionSpec()
        return treedef.unflatten([run(whole, *found, row) for found in zip(*flat, strict=True)])

    def layout(cache):
        return [place.spec for place in jax.tree.leaves(cache_shardings(cache, mesh))]

    specs = [layout(cache) for cache in caches]

    def run_all(row, *flat):
        return [run(*found, row) for found in zip(specs[0], *flat, strict=True)]

    on_each = jax.shard_map(
        run_all, mesh=mesh, in_specs=(PartitionSpec(), *specs), out_specs=layout(like)
    )
    return treedef.unflatten(on_each(row, *flat))


def _cut(spec: PartitionSpec) -> Any:
    """Mesh axes along which rows are cut."""
    return spec[0] if len(spec) > 0 and spec[0] is not None else ()


def _local(spec: PartitionSpec, leaf, row) -> tuple[Any, Any]:
    """Which of the rows of this device a row is, or any, and whether it is one of them."""
    axes, count = _cut(spec), leaf.shape[0]
    if not axes:
        return row, True
    at = row - jax.lax.axis_index(axes) * count
    return jnp.clip(at, 0, count - 1), (at >= 0) & (at < count)
