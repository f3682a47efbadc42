"""OrthoAdam: Adam whose moments live in a random orthogonal basis of their own."""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float


def scale_by_orthoadam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    seed: int = 0,
    block_size: int = 256,
) -> optax.GradientTransformation:
    r"""Adam's rescaling of the gradient, done in a rotated basis and rotated back.

    $$ \hat g = Q g, \qquad u = Q^\top \mathrm{Adam}(\hat g) $$

    Why: Adam moves every coordinate by about the same amount, which makes the axes of the residual
    stream special and lets outliers grow along a few of them. In a basis of its own for every
    parameter there is no common axis to grow along.

    Our reading, where the paper has a dense Q over all elements of a tensor: Q is a Kronecker
    product with one factor for each axis of the array; a factor is cut into nearly equal blocks of at most
    `block_size`, each a Haar-random matrix that all blocks of its size share, behind random signs
    that differ between parameters, layers and axes. It is orthogonal, a function of the seed and
    the paths alone, and needs no memory but `block_size ** 2` numbers. A layer gets the same Q
    whether layers are stacked or not.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
      seed: of the bases.
      block_size: coordinates of one axis that are mixed; 1 is Adam.

    Returns:
      The transformation; its state is that of `optax.scale_by_adam`.

    Source: Kaul et al., "From Attention to Activation", arXiv:2410.17174, algorithm 1.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        moved, state = adam.update(rotate(updates, seed, block_size), state)
        return rotate(moved, seed, block_size, inverse=True), state

    return optax.GradientTransformation(adam.init, update)


def rotate(tree: Any, seed: int, block_size: int, *, inverse: bool = False) -> Any:
    """Every parameter in its own orthogonal basis, or back.

    Args:
      tree: nested dictionary of arrays, layers stacked or not.
      seed, block_size: as in `scale_by_orthoadam`.
      inverse: go back.

    Returns:
      The same tree, shapes and dtypes; the arithmetic is float32 at least.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    stacks = _stacks(paths)

    def turned(keys: Any, leaf: Array) -> Array:
        path = _path(keys)
        found = re.match(r"blocks/(\d+)/(.*)", path)
        if found is None:
            return _turn(leaf, [path], seed, block_size, inverse)
        place, name = int(found[1]), found[2]
        if not stacks.get(place, False):
            return _turn(leaf, [f"blocks/{place}/{name}"], seed, block_size, inverse)
        layers = range(place, leaf.shape[0] * len(stacks), len(stacks))
        names = [f"blocks/{layer}/{name}" for layer in layers]
        return _turn(leaf, names, seed, block_size, inverse, stacked=True)

    return jax.tree_util.tree_map_with_path(turned, tree)


def _stacks(paths: Any) -> dict[int, bool]:
    """Whether each entry of `blocks` is a stack of layers: the query kernel tells."""
    query = r"blocks/(\d+)/attention/query/kernel$"
    found = ((re.match(query, _path(keys)), leaf) for keys, leaf in paths)
    return {int(match[1]): len(leaf.shape) == 4 for match, leaf in found if match}


def _turn(
    leaf: Float[Array, "..."],
    names: list[str],
    seed: int,
    block_size: int,
    inverse: bool,
    stacked: bool = False,
) -> Float[Array, "..."]:
    x = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    for axis in range(int(stacked), leaf.ndim):
        size = leaf.shape[axis]
        signs = np.stack([_signs(f"{seed}/{name}/{axis - stacked}", size) for name in names])
        lead = (len(names),) if stacked else ()
        around = [1] * (leaf.ndim - axis - 1)
        signs = signs.reshape(*lead, *[1] * (axis - len(lead)), size, *around)
        # Q = blocks(R) diag(signs), and backwards diag(signs) blocks(R)^T.
        x = x if inverse else x * signs
        x = _blocks(x, axis, seed, block_size, inverse)
        x = x * signs if inverse else x
    return x.astype(leaf.dtype)


def _blocks(x: Array, axis: int, seed: int, block_size: int, inverse: bool) -> Array:
    # Nearly equal blocks: with full blocks and a rest, a vocabulary of 257 would leave BOS alone.
    size = x.shape[axis]
    count = -(-size // block_size)
    small, wide = divmod(size, count)
    parts, begin = [], 0
    for width, number in ((small + 1, wide), (small, count - wide)):
        if number == 0:
            continue
        part = jax.lax.slice_in_dim(x, begin, begin + width * number, axis=axis)
        begin += width * number
        if width > 1:
            matrix = _orthogonal(seed, width)
            matrix = jnp.asarray(matrix.T if inverse else matrix, x.dtype)
            shape = part.shape
            part = part.reshape(*shape[:axis], number, width, *shape[axis + 1 :])
            part = jnp.tensordot(
                matrix, part, axes=(1, axis + 1), precision=jax.lax.Precision.HIGHEST
            )
            part = jnp.moveaxis(part, 0, axis + 1).reshape(shape)
        parts.append(part)
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def _signs(name: str, size: int) -> np.ndarray:
    draw = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, size)
    return (2 * draw - 1).astype(np.float32)


def _orthogonal(seed: int, size: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng((seed, size)).normal(size=(size, size)))
    # Without this the distribution leans towards the signs that the decomposition prefers.
    return q * np.sign(np.diagonal(r))


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
