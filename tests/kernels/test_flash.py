"""Every implementation of attention, held to the specification by the conformance suite."""

import functools
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import reference, rows, xla
from sinkjax_kernels.flash.families import family_of

# Tests are no package: the suite is loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "conformance", pathlib.Path(__file__).with_name("conformance.py")
)
conformance = sys.modules.setdefault("conformance", importlib.util.module_from_spec(_SPEC))
if not hasattr(conformance, "CASES"):
    _SPEC.loader.exec_module(conformance)

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "xla": xla.attention,
    "xla in small blocks": functools.partial(xla.attention, block_q=5, block_k=7),
}
ROWS = functools.partial(rows.attention, block_q=5)


def test_cases_cover_every_pair_and_stay_few():
    options = conformance.OPTIONS
    names = list(options)
    for a in names:
        for b in names:
            if a < b:
                pairs = {(getattr(c, a), getattr(c, b)) for c in conformance.CASES}
                assert pairs >= {(x, y) for x in options[a] for y in options[b]}, (a, b)
    assert len(conformance.CASES) <= 80  # programs per implementation; the oracle is shared


@pytest.mark.parametrize("case", conformance.CASES, ids=str)
def test_specification_equals_numpy(case):
    out, lse = conformance.numpy_attention(case)
    want = conformance.expected(case)  # the specification in float64
    bound = (
        dict(rtol=1e-12, atol=1e-12) if case.dtype != "bfloat16" else dict(rtol=1e-11, atol=1e-11)
    )
    np.testing.assert_allclose(want["out"], out, **bound)
    if lse is not None:
        np.testing.assert_allclose(want["lse"], lse, **bound)


# The blockwise code runs every case. The float32 specification, and the single tile that default
# blocks make of these sizes, take turns: the first is compared with NumPy above, the second is the
# same code without its loops.
RUNS = [
    (name, case)
    for n, case in enumerate(conformance.CASES)
    for turn, name in enumerate(IMPLEMENTATIONS)
    if turn == 2 or n % 3 == turn
]


@pytest.mark.parametrize(("name", "case"), RUNS, ids=str)
def test_conformance(name, case):
    conformance.check(IMPLEMENTATIONS[name], case)


def has_blocks(case) -> bool:
    try:
        family_of(case.static["normalizer"])
    except NotImplementedError:
        return False
    return True


MORE_RUNS = [
    ("xla in small blocks" if has_blocks(case) else "rows in small blocks", case)
    for case in conformance.MORE_CASES
]


@pytest.mark.parametrize(("name", "case"), MORE_RUNS, ids=str)
def test_conformance_of_the_other_normalizers(name, case):
    """Tiles for those with an online algorithm, rows for the others; learned leaves included."""
    conformance.check(ROWS if name.startswith("rows") else IMPLEMENTATIONS[name], case)


@pytest.mark.parametrize("case", conformance.CASES[::27], ids=str)
def test_rows_serve_the_first_normalizers_too(case):
    conformance.check(ROWS, case)


def operands(T, S, N=4, K=2, H=5, seed=0, **mask):
    rng = np.random.default_rng(seed)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in [(1, T, N, H), (1, S, K, H), (1, S, K, 3)]
    )
    return query, key, value, None, None, masks.build((1, T, S, K), **mask), None


STATIC = {"normalizer": normalizers.Softmax1(), "scale": 0.5, "logits_soft_cap": None}


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of every value in a jaxpr, the bodies of its loops and branches included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")}
        for parameter in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found |= shapes_in(inner)
    return found


@pytest.mark.parametrize(
    "normalizer",
    ["softmax1", "sigmoid", "softpick", "sigsoftmax", "cog", "relu", "consmax", "rectified_only"],
)
def test_xla_holds_no_square(normalizer):
    T, S = 1030, 2060  # several default blocks in both directions

    def loss(query, key, value):
        mask = masks.build(
            (1, T, S, 2), is_causal=True, num_sink_tokens=3, local_window_size=(40, 0)
        )
        static = STATIC | {"normalizer": normalizers.resolve(normalizer)}
        out, _ = xla.attention(query, key, value, None, None, mask, None, **static)
        return out.sum()

    shapes = shapes_in(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*operands(T, S)[:3]).jaxpr)
    assert (1, 2, 2, 256, 512) in shapes  # the tile of logits: the walk does see the loops
    assert max(int(np.prod(s)) for s in shapes) < T * S / 4


@pytest.mark.parametrize("normalizer", ["entmax15", "elastic_softmax", "stick_breaking"])
def test_rows_hold_no_square(normalizer):
    """Neither forward nor as residuals of the backward pass: a block of rows at a time."""
    T, S, N = 1030, 2060, 4

    def loss(query, key, value, bias):
        mask = masks.build((1, T, S, 2), is_causal=True, num_sink_tokens=3)
        static = STATIC | {"normalizer": normalizers.resolve(normalizer)}
        return rows.attention(query, key, value, bias, None, mask, None, **static)[0].sum()

    query, key, value = operands(T, S)[:3]
    bias = jnp.zeros((1, N, 1, S))
    grad = jax.grad(loss, argnums=(0, 1, 2, 3))
    shapes = shapes_in(jax.make_jaxpr(grad)(query, key, value, bias).jaxpr)
    assert (1, N, 128, S) in shapes  # a block of logits: the walk does see the loops
    assert max(int(np.prod(s)) for s in shapes) <= N * 128 * S


def test_shape_walk_sees_a_square():
    """The check above would fail for the dense specification."""
    T, S = 1030, 2060
    jaxpr = jax.make_jaxpr(lambda *x: reference.attention(*x, **STATIC))(*operands(T, S)).jaxpr
    assert (1, 4, T, S) in shapes_in(jaxpr)


def test_skipped_tiles_are_the_invisible_ones():
    """A tile is skipped only when none of its pairs is visible, and a window skips most tiles."""
    T, S = 40, 60
    mask = masks.build((1, T, S, 2), is_causal=True, local_window_size=(6, 0), num_sink_tokens=2)
    table = np.asarray(mask.block_table(5, 6))
    pairs = np.asarray(mask.visible())[0, 0].reshape(8, 5, 10, 6).any(axis=(1, 3))
    assert not (pairs & ~table).any()
    assert table.sum() <= 8 * 4  # sink tile and at most three of the window, of ten
    np.testing.assert_array_equal(table, pairs)  # exact for positions in order


def test_invisible_tiles_are_not_visited():
    """0 · NaN is NaN: a tile of NaN that no row sees shows in the result once it is computed."""
    query, key, value, *rest = operands(20, 20, is_causal=True, local_window_size=(4, 0))
    key, value = key.at[:, 15:].set(jnp.nan), value.at[:, 15:].set(jnp.nan)

    def loss(query, block):
        run = functools.partial(xla.attention, block_q=block, block_k=block)
        out, _ = run(query, key, value, *rest, **STATIC)
        return out[:, :15].sum(), out

    slope, out = jax.grad(loss, has_aux=True)(query, 5)
    assert np.isfinite(out[:, :15]).all() and np.isfinite(slope[:, :15]).all()
    _, whole = jax.grad(loss, has_aux=True)(query, 20)  # one tile: all of it is computed
    assert np.isnan(whole[:, :15]).all()


def test_deterministic_and_equal_under_vmap_and_remat():
    args = operands(13, 17, is_causal=True)
    run = functools.partial(xla.attention, block_q=5, block_k=7, **STATIC)
    f = jax.jit(lambda q: run(q, *args[1:])[0])
    out = f(args[0])
    np.testing.assert_array_equal(out, f(args[0]))
    stacked = jnp.stack([args[0], args[0] * 2])
    mapped = jax.jit(jax.vmap(lambda q: run(q, *args[1:])[0]))(stacked)
    np.testing.assert_allclose(mapped[0], out, atol=1e-6)
    plain = jax.jit(jax.grad(lambda q: (run(q, *args[1:])[0] ** 2).sum()))(args[0])
    again = jax.jit(jax.grad(jax.checkpoint(lambda q: (run(q, *args[1:])[0] ** 2).sum())))(args[0])
    np.testing.assert_allclose(plain, again, atol=1e-6)


def test_row_that_sees_nothing_is_exactly_zero():
    args = list(operands(13, 17))
    args[4] = jnp.ones((1, 1, 13, 1), bool).at[:, :, 4].set(False)
    for name, run in IMPLEMENTATIONS.items():
        for normalizer, lse_there in [("softmax", -np.inf), ("softmax1", 0.0), ("softpick", None)]:
            static = STATIC | {"normalizer": normalizers.resolve(normalizer)}

            def loss(*qkv, run=run, static=static):
                out, lse = run(*qkv, *args[3:], **static)
                return out.sum(), (out, lse)

            gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
            grads, (out, lse) = gradients(*args[:3])
            assert (np.asarray(out[:, 4]) == 0).all(), name
            assert (np.asarray(grads[0][:, 4]) == 0).all(), name
            assert all(np.isfinite(g).all() for g in grads), name
            if lse_there is not None:
                np.testing.assert_array_equal(lse[:, 4], lse_there)
