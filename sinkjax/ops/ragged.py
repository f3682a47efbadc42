"""Products of runs of rows with a matrix of their own, dropless: `jax.lax.ragged_dot` for training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sinkjax_kernels.varying import alike, as_in

# Rows of one step of the gradient of the kernels. 512 rows of bfloat16 make a product of
# [512, K] with [512, N] about as long as reading and writing its [K, N] sum in float32 on a TPU v5p.
TILE = 512


def ragged_linear(
    x: Float[Array, "M K"],
    kernel: Float[Array, "E K N"],
    sizes: Int[Array, " E"],
    bias: Float[Array, "E N"] | None = None,
) -> Float[Array, "M N"]:
    r"""Row m times the matrix of its run: runs of rows lie one after the other, E of them.

    $$ y_m = x_m W_{e(m)} + b_{e(m)}, \qquad e(m) = \min \{e : m < \sum_{i \le e} \mathrm{size}_i\} $$

    Why: experts get as many tokens as chose them, and the shapes still do not depend on it. JAX's
    own gradient by the kernel becomes E dense products on TPU (jax 0.10.2: 32 times the arithmetic
    with 32 experts), so it is a loop over tiles of rows here, at most E tiles more than there are.

    Args:
      x: `[M, K]`.
      kernel: `[E, K, N]`, of the dtype of `x`.
      sizes: `[E]`, rows in each run. Rows after the last run belong to none: **what comes out there
        is undefined**, in the gradient by `x` as well, and counts in no other gradient.
      bias: `[E, N]`.

    Returns:
      `[M, N]`, in the dtype of `x`.
    """
    x, kernel, sizes, bias = alike((x, kernel, sizes, bias))
    return _linear(x, kernel, sizes, bias)


@jax.custom_vjp
def _linear(x, kernel, sizes, bias):
    y = jax.lax.ragged_dot(x, kernel, sizes)
    if bias is None:
        return y
    chosen = _runs(sizes, x.shape[0]).astype(x.dtype)
    return y + jnp.dot(chosen, bias.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def _forward(x, kernel, sizes, bias):
    return _linear(x, kernel, sizes, bias), (x, kernel, sizes, bias)


def _backward(kept, g):
    x, kernel, sizes, bias = kept
    dx = jax.lax.ragged_dot(g, kernel.swapaxes(1, 2), sizes)
    dkernel = _outer(x, g, sizes, kernel.dtype)
    if bias is None:
        return dx, dkernel, None, None
    run = _runs(sizes, x.shape[0])
    # Not a product with 0: a row of no run may hold NaN.
    real = jnp.where(run.any(axis=1, keepdims=True), g, 0)
    wide = jnp.promote_types(g.dtype, jnp.float32)
    dbias = jnp.einsum(
        "ME,MN->EN", run.astype(g.dtype), real, preferred_element_type=wide, precision="highest"
    )
    return dx, dkernel, None, dbias.astype(bias.dtype)


_linear.defvjp(_forward, _backward)


def _runs(sizes: Int[Array, " E"], M: int) -> Bool[Array, "M E"]:
    """Whether a row lies in a run."""
    ends, row = jnp.cumsum(sizes), jnp.arange(M)[:, None]
    return (row >= ends - sizes) & (row < ends)


def _outer(x, g, sizes, dtype):
    """[E, K, N]: for each run the sum of x_m g_m^T over its rows, exactly 0 for an empty one."""
    M, E = x.shape[0], sizes.shape[0]
    tile = min(TILE, M)
    blocks = -(-M // tile)
    rows = blocks * tile
    x, g = (jnp.pad(array, ((0, rows - M), (0, 0))) for array in (x, g))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    # Every run visits the tiles that it touches, so a tile is visited once for each of its runs.
    first = starts // tile
    visits = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    done = jnp.cumsum(visits)
    step = jnp.arange(blocks + E)
    run = jnp.minimum((step[:, None] >= done).sum(axis=1), E - 1)
    block = jnp.clip(first[run] + step - (done - visits)[run], 0, blocks - 1)
    lower, upper = starts[run], jnp.where(step < done[-1], ends[run], 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    shape = (x.shape[1], g.shape[1])
    start = (
        jnp.zeros((E, *shape), dtype),
        jnp.zeros(shape, wide),
        jnp.zeros((), run.dtype),
    )

    def add(carry, visit):
        total, part, before = carry
        run, block, lower, upper = visit
        row = block * tile + jnp.arange(tile)
        inside = ((row >= lower) & (row < upper))[:, None]
        x_tile, g_tile = (
            jnp.where(inside, jax.lax.dynamic_slice_in_dim(array, block * tile, tile), 0)
            for array in (x, g)
        )
        new = jax.lax.dot_general(
            x_tile, g_tile, (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        part = jnp.where(run == before, part, 0) + new
        # Each visit writes what there is so far; the last one of a run writes all of it.
        total = jax.lax.dynamic_update_index_in_dim(total, part.astype(dtype), run, 0)
        return (total, part, run), None

    (total, _, _), _ = jax.lax.scan(add, as_in(start, (x, g, sizes)), (run, block, lower, upper))
    return total
