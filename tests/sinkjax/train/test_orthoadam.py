"""OrthoAdam: the bases are orthogonal, and Adam sees the rotated problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sinkjax.train import orthoadam
from sinkjax.train.orthoadam import scale_by_orthoadam

SHAPES = {
    "embedding": {"embedding": (13, 11)},
    "blocks": {
        i: {"attention": {"query": {"kernel": (11, 3, 4)}, "sinks": (3,)}, "scale": ()}
        for i in range(4)
    },
}
BLOCK = 5
rotate = jax.jit(orthoadam.rotate, static_argnums=(1, 2), static_argnames="inverse")


def _tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def _stack(tree):
    """Four layers as two stacks: layers 0, 2 and layers 1, 3."""
    layers = tree["blocks"]
    both = {
        i: jax.tree.map(lambda a, b: jnp.stack([a, b]), layers[i], layers[i + 2]) for i in (0, 1)
    }
    return tree | {"blocks": both}


def _close(a, b, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


def test_every_basis_is_orthogonal_and_undone():
    tree = _tree(0)
    turned = rotate(tree, 0, BLOCK)
    _close(rotate(turned, 0, BLOCK, inverse=True), tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(turned), strict=True):
        np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=1e-6)
    # The matrix itself, column by column.
    units = jnp.eye(33).reshape(33, 11, 3)
    columns = jax.vmap(lambda e: rotate({"w": e}, 7, BLOCK)["w"].ravel())(units)
    np.testing.assert_allclose(columns @ columns.T, np.eye(33), atol=1e-6)
    # 11 in blocks of at most 5 are 4 + 4 + 3: every coordinate is mixed with others, of its block.
    mixed = np.abs(np.asarray(columns).reshape(11, 3, 11, 3)).max((1, 3)) > 1e-6
    block = np.repeat(np.arange(3), [4, 4, 3])
    np.testing.assert_array_equal(mixed, block[:, None] == block)


def test_bases_differ_between_parameters_layers_and_seeds_and_repeat():
    same = jnp.asarray(np.random.default_rng(1).normal(size=(11, 3, 4)), jnp.float32)
    turned = [
        rotate({"blocks": {i: {"attention": {name: {"kernel": same}}}}}, seed, BLOCK)
        for i, name, seed in [(0, "query", 0), (1, "query", 0), (0, "key", 0), (0, "query", 1)]
    ]
    arrays = [jax.tree.leaves(tree)[0] for tree in turned]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(arrays[i], arrays[j], atol=0.1)
    _close(rotate(_tree(0), 3, BLOCK), rotate(_tree(0), 3, BLOCK), atol=0)


def test_a_layer_has_one_basis_stacked_or_not():
    tree = _tree(0)
    _close(rotate(_stack(tree), 0, BLOCK), _stack(rotate(tree, 0, BLOCK)))


def test_without_mixing_it_is_adam():
    """Blocks of one are signs, which Adam does not see."""
    ours, adam = scale_by_orthoadam(0.8, 0.9, block_size=1), optax.scale_by_adam(0.8, 0.9)
    state, other = ours.init(_tree(0)), adam.init(_tree(0))
    first, second = jax.jit(ours.update), jax.jit(adam.update)
    for seed in range(3):
        got, state = first(_tree(seed), state)
        want, other = second(_tree(seed), other)
        _close(got, want, atol=1e-7)


def test_it_is_adam_on_the_rotated_problem():
    """x under OrthoAdam on f is Q^T y, y under Adam on y -> f(Q^T y) from y = Q x."""
    start, goal = _tree(0), _tree(1)

    def f(x):
        return sum(
            jnp.sum((a - b) ** 4) for a, b in zip(*map(jax.tree.leaves, (x, goal)), strict=True)
        )

    def walk(f, transformation, x):
        optimizer = optax.chain(transformation, optax.scale(-0.1))

        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(jax.grad(f)(x), state)
            return (optax.apply_updates(x, updates), state), f(x)

        return jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=7))(x)

    (x, _), losses = walk(f, scale_by_orthoadam(block_size=BLOCK), start)
    back = lambda y: rotate(y, 0, BLOCK, inverse=True)  # noqa: E731
    (y, _), others = walk(lambda y: f(back(y)), optax.scale_by_adam(), rotate(start, 0, BLOCK))
    _close(x, back(y), atol=2e-4)
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    (adam, _), _ = walk(f, optax.scale_by_adam(), start)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), x, adam))) > 0.05


def test_the_state_is_adams_and_nothing_more():
    tree = _tree(0)
    optimizer = scale_by_orthoadam()
    size = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(tree)))
    assert size == 2 * sum(leaf.size for leaf in jax.tree.leaves(tree)) + 1
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    update, state = jax.eval_shape(optimizer.update, narrow, optimizer.init(narrow))
    for leaf in jax.tree.leaves((update, state.mu)):
        assert leaf.dtype == jnp.bfloat16


def test_a_run_goes_on_bit_for_bit_from_its_state():
    """The bases are no part of the state: another process makes the same ones again."""
    step = jax.jit(scale_by_orthoadam(block_size=BLOCK).update)
    state = scale_by_orthoadam().init(_tree(0))
    for seed in range(2):
        _, state = step(_tree(seed), state)
    saved = jax.tree.map(np.array, state)
    whole, _ = step(_tree(5), state)
    resumed, _ = jax.jit(scale_by_orthoadam(block_size=BLOCK).update)(_tree(5), saved)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize("size", [1, 257, 600])
def test_blocks_leave_no_coordinate_alone(size):
    """A vocabulary of 257 in full blocks of 256 would leave the last token by itself."""
    unit = jnp.zeros(size).at[-1].set(1.0)
    turned = rotate({"w": unit}, 0, 256)["w"]
    assert float(jnp.abs(turned).max()) < (0.5 if size > 1 else 1.1)
    np.testing.assert_allclose(jnp.linalg.norm(turned), 1, rtol=1e-6)
