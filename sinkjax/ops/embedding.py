"""Look tokens up in a table that is cut over a mesh, without moving the table or the batch."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sinkjax.ops.shards import free_axes
from sinkjax.sharding import ROWS, constrain, divisible, take_rows
from sinkjax_kernels.varying import alike, as_in


def embed(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike | None = None
) -> Float[Array, "B T D"]:
    """`table[tokens]` in `dtype`; a token outside the table gives NaN.

    Why: rows of a table whose width is cut as the tokens are cut cross the mesh twice. Every device
    looks up its channels of all tokens, and an all-to-all turns channels into tokens: as many bytes as
    the result has, in `dtype`. Left to itself, XLA gathers the whole batch on every device where both
    rows and tokens are cut. A width that the cuts do not divide is looked up in the whole table.

    Args:
      table: `[V, D]`; on a mesh over `model` along V, where that divides, and along D over the axes that
        cut the tokens.
      tokens: `[B, T]`.
      dtype: of the result; None is that of the table. The gradient is added up in the table's.

    Returns:
      `[B, T, D]`, laid out as the tokens are.
    """
    dtype = table.dtype if dtype is None else dtype
    V, D = table.shape
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes()
    cut = divisible(PartitionSpec(ROWS, "sequence"), tokens.shape, mesh) if free else ()
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in cut)
    axes = tuple(name for entry in entries for name in entry if name in free)
    parts = math.prod(free[name] for name in axes)
    if parts == 1 or D % parts:
        return take_rows(table, tokens, mode="fill").astype(dtype)
    model = "model" if "model" in free and V % free["model"] == 0 else None
    layout = PartitionSpec(model, axes), PartitionSpec(*cut)
    return jax.shard_map(
        functools.partial(_exchange, V, axes, model, dtype),
        in_specs=layout,
        out_specs=PartitionSpec(*cut, None),
        axis_names=set(free),
    )(constrain(table, layout[0]), constrain(tokens, layout[1]))


def _exchange(V, axes, model, dtype, table, tokens):
    """On one device, with its channels of its part of the table."""
    first = jax.lax.axis_index(model) * table.shape[0] if model else 0
    row = jax.lax.all_gather(tokens, axes) - first  # [devices, B, T]
    here = (row >= 0) & (row < table.shape[0])
    rows: Any = _look_up(dtype, *alike((table, jnp.where(here, row, 0))))
    rows = jnp.where(here[..., None], rows, 0)
    rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=3, tiled=True)[0]
    if model:
        rows = jax.lax.psum(rows, model)
    return jnp.where(((tokens >= 0) & (tokens < V))[..., None], rows, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table, row):
    """`table[row]` in `dtype`, for rows `[devices, B, T]`."""
    return table.at[row].get(mode="clip").astype(dtype)


def _look_up_forward(dtype, table, row):
    return _look_up(dtype, table, row), (table, row)


def _look_up_backward(dtype, kept, rows):
    table, row = kept

    # One device's tokens after the other: a TPU's compiler sorts what is added at once, and takes the
    # longer the more there is.
    def add(total, part):
        index, values = part
        return total.at[index].add(values.astype(total.dtype)), None

    start = as_in(jnp.zeros(table.shape, table.dtype), (row, rows))
    return jax.lax.scan(add, start, (row, rows))[0], None


_look_up.defvjp(_look_up_forward, _look_up_backward)
