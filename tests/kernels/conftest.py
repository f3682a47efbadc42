"""An oracle for normalisers that knows no trick: the published formula in decimal arithmetic.

`decimal` has no overflow to avoid (e^10000 is a number like any other) and as many digits as one
asks for, so the formula stands as printed and a central difference of it is exact to 20 digits.
"""

import decimal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax._compat import enable_x64
from sinkjax_kernels import normalizers

ROW = np.array([0.3, -1.7, 2.2, 0.4, 1.1], np.float32)
ALL = np.ones(5, bool)
SOME = np.array([True, True, True, False, True])
ONE = np.arange(5) == 2
NONE = np.zeros(5, bool)
CASES = [
    *((ROW * sign, where) for sign in (1, -1) for where in (ALL, SOME, ONE, NONE)),
    *((np.full(5, level, np.float32), where) for level in (-1e4, 1e4) for where in (SOME, ONE)),
    *((ROW * 1e4, where) for where in (ALL, SOME)),
    (ROW + np.float32(1e4), SOME),
    (ROW - np.float32(1e4), SOME),
    (np.full(5, 0.7, np.float32), SOME),
    (np.full(5, -0.7, np.float32), SOME),
    (np.array([40, -40, 0.001, -0.001, 3], np.float32), ALL),
]
"""Logits and who is visible: moderate, all equal, ±1e4, one visible key, none."""

LEAF = 0.25
COTANGENT = np.array([0.7, -1.3, 0.4, 2.0, -0.6], np.float32)
STEP = decimal.Decimal("1e-25")


@pytest.fixture(scope="session")
def agree() -> Callable:
    """`agree(formulas)`: forward and all gradients of some normalisers are those of their formulas.

    Maps a spelling to `formula(x, **constants)`, which takes the visible logits as a list of decimals
    and the constants of the description, and gives their weights. Learned leaves are 1/4.
    """
    return _agree


def _agree(formulas: dict[str, Callable]) -> None:
    described = {spec: normalizers.resolve(spec) for spec in formulas}
    logits, where = (np.stack(x) for x in zip(*CASES, strict=True))
    visible = jnp.asarray(where)
    want = {}
    for spec, formula in formulas.items():
        with decimal.localcontext(prec=60):
            rows = [_by_hand(described[spec], formula, x, seen) for x, seen in CASES]
        want[spec] = [np.stack(part) for part in zip(*rows, strict=True)]

    def loss(logits, leaves, description):
        weights, _ = normalizers.weights(description, logits, visible, params=leaves)
        return (weights * COTANGENT).sum(), weights

    @jax.jit  # all of them in one program: compiling is what takes time here
    def run(logits, leaf):
        results = {}
        for spec, description in described.items():
            leaves = {name: leaf for name in description.parameters}
            (_, weights), (slope, slopes) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                logits, leaves, description
            )
            slopes = [slopes[name][:, 0] for name in description.parameters]
            results[spec] = [weights, slope, *slopes]
        return results

    for dtype in ("float64", "float32"):
        with enable_x64(dtype == "float64"):
            x = jnp.asarray(logits, dtype)
            results = run(x, jnp.full((len(x), 1), LEAF, dtype))
        for spec, got in results.items():
            names = ["weights", "d_logits", *described[spec].parameters]
            for name, a, b in zip(names, got, want[spec], strict=True):
                assert a.dtype == dtype
                _close(f"{spec}, {dtype}: {name}", np.asarray(a), b, logits, name != "weights")
            hidden = np.stack([np.asarray(x)[~where] for x in got[:2]])
            assert (hidden == 0).all(), spec


def _by_hand(description, formula, x, where):
    """Weights, d logits and d leaf of one row, hidden keys 0; differences are central."""
    number = decimal.Decimal
    seen = [number(float(v)) for v in x[where]]
    cotangent = [number(float(c)) for c in COTANGENT[where]]
    constants = {
        name: value if isinstance(value, bool | None) else number(value)
        for name, value in vars(description).items()
    }
    for name in description.parameters:
        constants[name] += number(LEAF)

    def total(x, **changes):
        weights = formula(x, **constants | changes) if x else []
        return sum((w * c for w, c in zip(weights, cotangent, strict=True)), number(0))

    def spread(values):
        full = np.zeros(len(where))
        full[where] = [float(v) for v in values]
        return full

    slopes = []
    for j in range(len(seen)):
        up, down = list(seen), list(seen)
        up[j], down[j] = seen[j] + STEP, seen[j] - STEP
        slopes.append((total(up) - total(down)) / (2 * STEP))
    leaves = [
        float(
            (total(seen, **{n: constants[n] + STEP}) - total(seen, **{n: constants[n] - STEP}))
            / (2 * STEP)
        )
        for n in description.parameters
    ]
    return spread(formula(seen, **constants) if seen else []), spread(slopes), *leaves


def _close(name, got, want, logits, is_slope):
    """Within some units in the last place of the logits, times the size of the row."""
    unit = float(np.finfo(got.dtype).eps)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        size = np.abs(b).max() + (np.abs(COTANGENT).max() if is_slope else 0)
        bound = 40 * unit * (1 + np.abs(logits[n]).max()) * size
        assert np.isfinite(a).all(), (name, logits[n], a)
        assert np.abs(a - b).max() <= bound, (name, logits[n], a, b, bound)
