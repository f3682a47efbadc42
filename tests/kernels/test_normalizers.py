"""What holds for every normaliser: sweeps of properties, names, learned leaves, refusals.

The formula of each is in the file of its family.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import normalizers
from sinkjax_kernels.flash import families
from sinkjax_kernels.normalizers import Sigmoid, Softmax, Softmax1, Softpick

weights = jax.jit(normalizers.weights, static_argnums=0)

SPECS = [
    "softmax", "softmax1", "softmax_n(n=2.5)", "sigsoftmax", "cog",
    "sigmoid(bias=-1.0)", "sigmoid(normalized=True)", "relu", "relu(by_length=True)",
    "relu(normalized=True)", "elu", "elu(normalized=True)", "identity", "identity(normalized=True)",
    "consmax", "softpick", "rectified_only", "relu_softmax", "scaled_softpick", "ssmax",
    "clipped_softmax(gamma=-0.03)", "clipped_softmax(alpha=2.0)", "normalized_clipped_softmax",
    "elastic_softmax", "sparsemax", "entmax15", "entmax(alpha=1.25)", "stick_breaking",
]  # fmt: skip
ALL = {spec: normalizers.resolve(spec) for spec in SPECS}
ROW = jnp.array([0.3, -1.7, 2.2, 0.0, 5.0])
HERE = jnp.array([True, True, True, False, True])
ROWS, KEYS = 4, 7


def test_no_normalizer_is_left_out():
    assert {type(n) for n in ALL.values()} == set(normalizers.NAMES)


@functools.cache
def everything():
    """Weights and the gradient of a random sum of them, of all normalisers, in one program."""
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, KEYS)), jnp.float32)

    def loss(x, where, order, description):
        w, _ = normalizers.weights(description, x, where)
        return (w * cotangent[:, order]).sum(), w

    def run(x, where, order):
        results = {}
        for spec, description in ALL.items():
            logits = jnp.abs(x) if spec.startswith("elu") else x  # products of positive features
            (_, w), slope = jax.value_and_grad(loss, has_aux=True)(
                logits, where, order, description
            )
            results[spec] = w, slope
        return results

    return jax.jit(run)


# Eighths: small enough to be near zero, and never so small that an epsilon would matter.
EIGHTHS = st.one_of(st.integers(-80, 80), st.integers(-80_000, 80_000)).map(lambda n: n / 8)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    x=arrays.arrays(np.float32, (ROWS, KEYS), elements=EIGHTHS),
    where=arrays.arrays(bool, (ROWS, KEYS)),
    order=st.permutations(range(KEYS)),
)
def test_properties(x, where, order):
    run, order = everything(), np.array(order)
    got = jax.tree.map(np.asarray, run(x, where, np.arange(KEYS)))
    shuffled = jax.tree.map(np.asarray, run(x[:, order], where[:, order], order))
    for spec, (w, slope) in got.items():
        description = ALL[spec]
        assert np.isfinite(w).all() and np.isfinite(slope).all(), spec
        assert (w[~where] == 0).all() and (slope[~where] == 0).all(), spec
        assert description.is_signed or (w >= 0).all(), spec
        mass = w.sum(-1)
        if description.sums_to_one:
            nothing = (w == 0).all(-1)
            np.testing.assert_allclose(mass, np.where(nothing, 0, 1), atol=2e-6, err_msg=spec)
        if spec in AT_MOST_ONE:
            assert (mass <= 1 + 2e-6).all(), spec
        if description.family == "ordered" or spec == "identity(normalized=True)":
            continue  # the second divides by a sum that can cancel
        scale = np.abs(w).max() + 1e-30
        np.testing.assert_allclose(shuffled[spec][0], w[:, order], atol=1e-5 * scale, err_msg=spec)
        scale = np.abs(slope).max() + scale
        np.testing.assert_allclose(
            shuffled[spec][1], slope[:, order], atol=1e-4 * scale, err_msg=spec
        )


AT_MOST_ONE = {
    "softmax1", "softmax_n(n=2.5)", "softpick", "scaled_softpick", "elastic_softmax",
    "clipped_softmax(gamma=-0.03)", "clipped_softmax(alpha=2.0)", "stick_breaking",
}  # fmt: skip


SHIFT_INVARIANT = {
    "softmax", "ssmax", "clipped_softmax(gamma=-0.03)", "clipped_softmax(alpha=2.0)",
    "normalized_clipped_softmax", "elastic_softmax", "sparsemax", "entmax15", "entmax(alpha=1.25)",
}  # fmt: skip


def test_shifting_all_logits_changes_all_but_these():
    """A normaliser that can refuse a whole row must notice; those that cannot, must not."""
    x = jnp.tile(jnp.array([0.25, -1.5, 1.125, 0.5, 0.75, -0.375, 2.0]), (ROWS, 1))
    where = jnp.tile(jnp.arange(KEYS) != 3, (ROWS, 1))
    before, after = (everything()(x + s, where, np.arange(KEYS)) for s in (0.0, 1.5))
    for spec in SPECS:
        change = np.abs(before[spec][0] - after[spec][0]).max()
        assert (change < 1e-6) == (spec in SHIFT_INVARIANT), (spec, change)


def test_which_rows_sum_to_one():
    """`sums_to_one` is true of what sums to one in every row, and false of nothing that does."""
    x = jnp.stack([ROW, -ROW, ROW / 9, ROW - 3])
    x = jnp.pad(x, [(0, 0), (0, 2)])
    where = jnp.tile(jnp.pad(HERE, (0, 2)), (4, 1))
    for spec, (w, _) in everything()(x, where, np.arange(KEYS)).items():
        mass = np.asarray(w).sum(-1)
        whole = np.minimum(np.abs(mass - 1), (np.asarray(w) != 0).any(-1)) < 1e-5
        assert whole.all() == ALL[spec].sums_to_one, (spec, mass)
    named = {spec for spec in SPECS if ALL[spec].sums_to_one}
    assert named == {
        "softmax", "sigsoftmax", "sigmoid(normalized=True)", "relu(normalized=True)",
        "elu(normalized=True)", "rectified_only", "relu_softmax", "ssmax",
        "normalized_clipped_softmax", "sparsemax", "entmax15", "entmax(alpha=1.25)",
    }  # fmt: skip
    assert normalizers.SoftmaxN(0.0).sums_to_one


def test_signed_ones_and_no_others_give_negative_weights():
    x = jnp.tile(jnp.pad(-ROW, (0, 2)), (ROWS, 1))
    results = everything()(x, jnp.ones((ROWS, KEYS), bool), np.arange(KEYS))
    signed = {spec for spec, (w, _) in results.items() if (np.asarray(w) < 0).any()}
    assert signed == {spec for spec in SPECS if ALL[spec].is_signed}


def test_a_learned_leaf_is_added_to_the_constant():
    """A zero leaf is the description itself; one of size c is the description with c more."""
    learned = {
        "sigmoid(bias=-1.0)": {"bias": 0.5},
        "consmax": {"shift": 0.5, "divisor": 20.0},
        "scaled_softpick": {"scale": 0.4},
        "ssmax": {"scale": 0.4},
        "elastic_softmax": {"offset": 0.3},
    }
    assert {type(n) for n in ALL.values() if n.parameters} == {type(ALL[s]) for s in learned}
    for spec, leaves in learned.items():
        description = ALL[spec]
        assert set(description.parameters) == set(leaves)
        moved = type(description)(
            **vars(description) | {n: getattr(description, n) + x for n, x in leaves.items()}
        )
        zero = {n: jnp.zeros(()) for n in leaves}
        plain, _ = weights(description, ROW, HERE)
        np.testing.assert_array_equal(weights(description, ROW, HERE, params=zero)[0], plain)
        got, _ = weights(
            description, ROW, HERE, params={n: jnp.asarray(x) for n, x in leaves.items()}
        )
        np.testing.assert_allclose(got, weights(moved, ROW, HERE)[0], rtol=1e-6)
        assert np.abs(got - plain).max() > 1e-4, spec


def test_half_precision_is_computed_in_float32():
    got, lse = weights(Softmax(), ROW.astype(jnp.bfloat16), HERE)
    assert got.dtype == lse.dtype == jnp.float32


def test_names_round_trip():
    for description in [*ALL.values(), Softmax(), Sigmoid(), Softpick(epsilon=1e-6)]:
        again = normalizers.resolve(str(description))
        assert again == description and hash(again) == hash(description)
    assert normalizers.resolve(Softmax1()) == Softmax1()
    assert str(normalizers.resolve(" relu( normalized=True,divisor=2 ) ")) == (
        "relu(normalized=True, divisor=2.0)"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("softmax2", "normalizer: expected one of softmax, softmax1, softmax_n, sigsoftmax,"),
        ("softmax2", "stick_breaking, got 'softmax2'"),
        ("softmax_n(m=2)", "softmax_n takes n, got 'm'"),
        ("softmax(n=2)", "softmax takes no argument, got 'n'"),
        ("sigmoid(bias=low)", "expected name=number, got 'bias=low'"),
        ("sigmoid(normalized=1)", "expected name=True or name=False, got 'normalized=1'"),
        ("relu(divisor=True)", "expected name=number, got 'divisor=True'"),
        ("softmax_n(n=-1)", "n must be a finite number of at least 0"),
        ("sigmoid(bias=inf)", "bias must be finite"),
        ("softpick(epsilon=-1)", "epsilon must be at least 0"),
        ("relu(divisor=0)", "divisor must be above 0, got 0.0"),
        ("relu(normalized=True, by_length=True)", "expected normalized or by_length, got both"),
        ("consmax(divisor=-1)", "divisor must be above 0"),
        ("ssmax(scale=nan)", "scale must be finite"),
        ("clipped_softmax(gamma=0.1)", "gamma must be at most 0"),
        ("clipped_softmax(zeta=0.5)", "zeta must be at least 1"),
        ("normalized_clipped_softmax(alpha=-1)", "alpha must be at least 0"),
        ("elastic_softmax(offset=inf)", "offset must be finite"),
        ("entmax(alpha=1)", "alpha must be above 1 (softmax) and at most 2 (sparsemax)"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(ValueError) as error:
        normalizers.resolve(spec)
    assert message in str(error.value)


def test_sinks_and_params_only_where_they_belong():
    for description in ALL.values():
        if not description.takes_sinks:
            with pytest.raises(ValueError, match="only softmax takes sink logits"):
                normalizers.weights(description, ROW, HERE, sinks=jnp.asarray(0.0))
    with pytest.raises(ValueError, match="softmax takes \\[\\], got \\['bias'\\]"):
        normalizers.weights(Softmax(), ROW, HERE, params={"bias": jnp.asarray(0.0)})


BLOCKWISE = {
    "softmax", "softmax1", "softmax_n(n=2.5)", "sigsoftmax", "cog", "sigmoid(bias=-1.0)", "relu",
    "elu", "identity", "consmax", "softpick", "rectified_only", "relu_softmax",
}  # fmt: skip


def test_families_serve_these_and_refuse_the_others_with_the_reason():
    for spec, description in ALL.items():
        if spec in BLOCKWISE:
            assert isinstance(families.family_of(description), families.Family)
        else:
            with pytest.raises(NotImplementedError, match="whole row|order of the keys"):
                families.family_of(description)
