"""How operands and outputs of a kernel vary over the axes of a mesh, inside `jax.shard_map`.

With `check_vma=True` a Pallas call is refused unless its operands vary alike and its outputs say how they
do. Call `alike` before a `custom_vjp`, so that JAX itself sums the cotangents of what did not vary.
"""

from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def _axes(tree: Any) -> frozenset[str]:
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    )


def alike(operands: Tree) -> Tree:
    """A tree of arrays, each varying wherever one of them does."""
    axes = _axes(operands)

    def widen(x):
        missing = tuple(axes - _axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, operands)


def as_in(tree: Tree, operands: Any) -> Tree:
    """A tree that varies, as one more of the operands would: what a loop over them begins with."""
    return alike((tree, operands))[0]


def struct(shape, dtype, *operands: Any) -> jax.ShapeDtypeStruct:
    """An output that depends on all operands: it varies wherever one of them does."""
    kind = type(jax.typeof(jax.tree.leaves(operands)[0]).manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind(varying=_axes(operands)))
