"""A model as what its programs are compiled for and the arrays they are given, and its mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from sinkjax.cache import Cache, Description, keep_layout
from sinkjax.sharding import ROWS, cache_shardings, constrain, divisible


@dataclasses.dataclass(frozen=True)
class Structure:
    """All of a model but its arrays: programs are kept by it, so models of one config share them.

    Args:
        graph: of the modules.
        paths: of the arrays in it.
        mesh: where the arrays lie, or None for one device.
    """

    graph: nnx.GraphDef[Any]
    paths: Any
    mesh: Mesh | None

    def model(self, arrays: list[Any]) -> Any:
        """The model, inside a program. Lists of arrays are what `jax.jit` takes in fastest."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.paths, arrays))

    def jit(self, run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`jax.jit(run, **options)`, which knows the mesh as the current one."""
        program = jax.jit(run, **options)
        if self.mesh is None:
            return program

        @functools.wraps(program)
        def on_mesh(*arguments):
            with jax.set_mesh(self.mesh):
                return program(*arguments)

        return on_mesh


def split(model: Any) -> tuple[Structure, list[Any]]:
    """A model as structure and arrays."""
    graph, state = nnx.split(model)
    arrays, paths = jax.tree.flatten(state)
    meshes = (getattr(getattr(array, "sharding", None), "mesh", None) for array in arrays)
    mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)
    return Structure(graph, paths, mesh), arrays


def empty_cache(model: Any, description: Description, rows: int) -> Cache:
    """`model.init_cache`; on a mesh, each device makes its part of it, laid out for good."""
    structure, arrays = split(model)
    if structure.mesh is None:
        return model.init_cache(description, rows)
    return _maker(structure, description, rows)(arrays)


@functools.lru_cache(maxsize=16)
def _maker(structure: Structure, description: Description, rows: int) -> Callable[..., Cache]:
    return structure.jit(
        lambda arrays: keep_layout(structure.model(arrays).init_cache(description, rows))
    )


def place(structure: Structure, cache: Cache) -> Cache:
    """The cache on the model's mesh, laid out by `cache_shardings`; itself where there is none."""
    mesh = structure.mesh
    if mesh is None:
        return cache

    def put(leaf, layout):
        if leaf.sharding.is_equivalent_to(layout, leaf.ndim):
            return leaf
        # As programs with explicit axes write it: by another name it would be compiled for again.
        longer = leaf.ndim - len(layout.spec) if AxisType.Explicit in mesh.axis_types else 0
        spec = PartitionSpec(*layout.spec, *[None] * longer)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, cache, cache_shardings(cache, mesh))


def by_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Inside a program: something of each row, laid out by rows and whole along the rest."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else constrain(x, _rows_first(x, mesh))


def whole_logits(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Inside a program: logits by rows, each with all of the vocabulary.

    Why: they are made in parts, where the columns of the head are, and then gathered. A compiler that
    is only told that rows are whole gathers the head itself, in every step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return logits
    spec = divisible(PartitionSpec(ROWS, "model"), logits.shape, mesh)
    return by_rows(constrain(logits, spec))


def for_rows(run: Callable[..., Any], *arrays: Shaped[Array, "B ..."]) -> Any:
    """Inside a program: `run(*arrays)`, on a mesh by each device for its rows.

    Why: compilers gather all rows for what they cannot cut, `top_k` for one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*arrays)
    specs = tuple(_rows_first(x, mesh) for x in arrays)
    out = PartitionSpec(specs[0][0])
    return jax.shard_map(run, in_specs=specs, out_specs=out)(*map(by_rows, arrays))


def _rows_first(x: Any, mesh: Any) -> PartitionSpec:
    return divisible(PartitionSpec(ROWS, *[None] * (x.ndim - 1)), x.shape, mesh)
