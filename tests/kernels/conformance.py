"""One suite for every implementation of attention: forward, gradients, edge cases.

An implementation is a function with the signature of `flash.reference.attention`. Its result and its
gradients by query, key, value, bias, sinks and learned leaves are compared with the float64 derivative of the
specification; the specification itself is compared with a NumPy one (`numpy_attention`) in
`test_reference.py`. Cases are a pairwise covering set of the options: each pair of values of two
options occurs in some case. Sizes are pairwise distinct, so that no two axes can be swapped unseen.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax._compat import enable_x64
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import reference

B, T, S, H, HV = 2, 13, 17, 5, 3

TOLERANCES = {  # relative root-mean-square error, largest error over the largest magnitude
    "float32": {"out": (2e-6, 6e-6), "grad": (6e-6, 3e-5), "leaf": (3e-5, 9e-5)},
    "bfloat16": {"out": (4e-3, 2e-2), "grad": (8e-3, 4e-2), "leaf": (8e-3, 4e-2)},
}
"""float32 against float64; bfloat16 against float64 on the rounded inputs. A learned leaf is one
number per head: all that the queries add to its gradient may cancel."""

SINK_LOGITS = (-1e4, -20.0, 0.0, 5.0, 60.0, 1e4)

OPTIONS: dict[str, tuple] = {
    "normalizer": (
        "softmax", "softmax1", "softmax_n(n=2.5)", "sigmoid(bias=-2.0)", "softpick",
        *(("softmax", s) for s in SINK_LOGITS), ("softmax", "per token"),
    ),
    "heads": ((2, 2), (6, 2), (8, 1)),  # (N, K): groups of 1, 3 and 8
    "mask": ("full", "causal", "window 1", "window 4", "window > S", "two-sided"),
    "sink_tokens": (0, 2, "all", "key_is_sink"),
    "places": ("index", "offset", "shuffled with empty slots", "per head", "segments", "both"),
    "lengths": (False, True),
    "soft_cap": (None, 1.5),
    "bias": (None, "full", "row"),
    "mask_array": (None, "full", "column"),
    "dtype": ("float32", "float32", "bfloat16"),
}  # fmt: skip

NORMALIZERS = (
    "sigsoftmax", "cog", ("sigmoid(bias=-1.0)", "learned"), "sigmoid(normalized=True)",
    "relu(divisor=3.0)", "relu(by_length=True)", "identity", ("consmax(divisor=4.0)", "learned"),
    "rectified_only", "relu_softmax", ("scaled_softpick", "learned"), ("ssmax", "learned"),
    "clipped_softmax(alpha=0.5)", "normalized_clipped_softmax",
    ("elastic_softmax(offset=-0.6)", "learned"), "entmax15", "stick_breaking",
)  # fmt: skip
"""What is not in `OPTIONS`, one of each kind; all of them together have the pairwise covering set of
the other options once. `elu` is `identity` once queries and keys are mapped."""

OTHERS: dict[str, tuple] = {
    "heads": ((6, 2), (8, 1)),
    "mask": ("causal", "full", "window 4", "two-sided"),
    "sink_tokens": (0, 2, "key_is_sink"),
    "places": ("index", "shuffled with empty slots", "per head", "segments"),
    "lengths": (False, True),
    "soft_cap": (None, 1.5),
    "bias": (None, "full", "row"),
    "mask_array": (None, "full", "column"),
    "dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of options, and the operands it stands for."""

    normalizer: Any
    heads: tuple[int, int]
    mask: str
    sink_tokens: Any
    places: str
    lengths: bool
    soft_cap: float | None
    bias: str | None
    mask_array: str | None
    dtype: str
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(
            str(getattr(self, f.name)).replace(" ", "") for f in dataclasses.fields(self)
        )

    @functools.cached_property
    def operands(self) -> tuple:
        """query, key, value, bias, mask, visibility, sinks; rounded to the case's dtype."""
        rng = np.random.default_rng(self.seed)
        N, K = self.heads

        def draw(*shape):
            return jnp.asarray(rng.normal(size=shape), dtype=self.dtype)

        query, key, value = draw(B, T, N, H) * 2, draw(B, S, K, H), draw(B, S, K, HV)
        bias_shapes = {None: None, "full": (B, N, T, S), "row": (1, N, 1, S)}
        bias = None if self.bias is None else draw(*bias_shapes[self.bias])
        mask = None
        if self.mask_array is not None:
            shape = {"full": (B, 1, T, S), "column": (1, N, T, 1)}[self.mask_array]
            mask = rng.uniform(size=shape) < 0.8
            mask[..., 3, :] = False  # a row that sees nothing
            mask = jnp.asarray(mask)
        sinks = None
        if isinstance(self.normalizer, tuple) and self.normalizer[1] != "learned":
            level = self.normalizer[1]
            if level == "per token":
                sinks = jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32)
            else:
                sinks = jnp.asarray(level + rng.normal(size=N) * (abs(level) < 100), jnp.float32)
        return query, key, value, bias, mask, self._visibility(rng, K), sinks

    @property
    def params(self) -> dict[str, jax.Array]:
        """Learned leaves of the normaliser, where the case has some."""
        if not isinstance(self.normalizer, tuple) or self.normalizer[1] != "learned":
            return {}
        rng = np.random.default_rng(self.seed + 2)
        return {
            name: jnp.asarray(rng.uniform(-0.3, 0.3, size=self.heads[0]), jnp.float32)
            for name in self.static["normalizer"].parameters
        }

    def _visibility(self, rng, K) -> masks.Visibility:
        window = {
            "window 1": (0, 0),
            "window 4": (3, 0),
            "window > S": (S + 2, 0),
            "two-sided": (3, 2),
        }
        options: dict[str, Any] = {
            "is_causal": self.mask not in ("full", "two-sided"),
            "local_window_size": window.get(self.mask),
        }
        if self.sink_tokens == "key_is_sink":
            options["key_is_sink"] = rng.uniform(size=(B, K, S)) < 0.2
        else:
            options["num_sink_tokens"] = S + 3 if self.sink_tokens == "all" else self.sink_tokens
        if self.places == "offset":
            options["query_positions"] = np.arange(T) + (S - T)
        if self.places == "shuffled with empty slots":
            positions = np.stack([rng.permutation(S) for _ in range(B)])
            positions[:, :3] = -1
            options["key_positions"] = positions
            options["query_positions"] = np.arange(T)[None] + np.array([[4], [0]])
        if self.places == "per head":
            positions = rng.permuted(np.broadcast_to(np.arange(S), (B, K, S)), axis=-1)
            options["key_positions"] = positions
        if self.places in ("segments", "both"):
            options["query_segment_ids"] = np.minimum(np.arange(T) // 5, 2) + np.zeros((B, 1), int)
            ids = np.repeat([0, 1, 2], [7, 4, 6])
            options["key_segment_ids"] = np.stack([ids, np.roll(ids, 2)])
        if self.places == "both":
            starts = np.array([0, 7, 11])
            options["key_positions"] = np.arange(S) - starts[np.repeat([0, 1, 2], [7, 4, 6])]
            options["query_positions"] = np.arange(T) % 5
        if self.lengths:
            options["query_seq_lengths"] = np.array([T - 2, T])
            options["key_value_seq_lengths"] = np.array([S - 4, 6])
        arrays = {k: jnp.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}
        return masks.build((B, T, S, K), **arrays)

    @property
    def static(self) -> dict[str, Any]:
        name = self.normalizer[0] if isinstance(self.normalizer, tuple) else self.normalizer
        return {
            "normalizer": normalizers.resolve(name),
            "scale": 0.7,
            "logits_soft_cap": self.soft_cap,
        }


def pairwise(options: dict[str, tuple], **fixed) -> Iterator[dict[str, Any]]:
    """A small set of combinations in which every pair of values of two options occurs."""
    names = list(options)
    choices = [range(len(options[name])) for name in names]
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(choices[a], choices[b])
    }
    while missing:
        row: dict[int, int] = {}
        a, i, b, j = min(missing)
        row[a], row[b] = i, j
        for c in range(len(names)):
            if c not in row:
                gains = [
                    sum((min(c, d), *((k, max(c, d), e) if c < d else (e, max(c, d), k))) in missing
                        for d, e in row.items())
                    for k in choices[c]
                ]  # fmt: skip
                row[c] = int(np.argmax(gains))
        missing -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}
        yield {name: options[name][row[c]] for c, name in enumerate(names)} | fixed


CASES = [Case(**choice, seed=n) for n, choice in enumerate(pairwise(OPTIONS))]

_ROWS = list(pairwise(OTHERS))
MORE_CASES = [
    Case(normalizer=NORMALIZERS[n % len(NORMALIZERS)], **_ROWS[n % len(_ROWS)], seed=100 + n)
    for n in range(max(len(NORMALIZERS), len(_ROWS)))
]


def value_and_grads(attention: Callable, case: Case, operands: tuple) -> dict[str, jax.Array]:
    """out, lse and the gradient by every differentiable operand, in one compiled program."""
    query, key, value, bias, mask, visibility, sinks = operands
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    rng = np.random.default_rng(case.seed + 1)
    N = case.heads[0]
    d_out, d_lse = rng.normal(size=(B, T, N, HV)), rng.normal(size=(B, T, N))

    def loss(leaves, mask, visibility):
        out, lse = attention(
            leaves["query"], leaves["key"], leaves["value"], leaves.get("bias"), mask, visibility,
            leaves.get("sinks"), **case.static, **(
                {"normalizer_params": leaves["params"]} if "params" in leaves else {}
            ),
        )  # fmt: skip
        total = (out.astype(dtype) * d_out).sum()
        if lse is not None:  # −inf where a row sees nothing: keep it out of the sum
            total += (jnp.where(lse == -jnp.inf, 0, lse) * d_lse).sum()
        return total, (out, lse)

    leaves = {"query": query, "key": key, "value": value, "bias": bias, "sinks": sinks}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    if case.params:
        leaves["params"] = {name: x.astype(dtype) for name, x in case.params.items()}
    grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(leaves, mask, visibility)
    grads |= {f"leaf_{name}": g for name, g in grads.pop("params", {}).items()}
    result = {"out": out, **{f"d_{name}": g for name, g in grads.items()}}
    return result if lse is None else result | {"lse": lse}


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """The same in float64, by differentiating the specification."""
    operands = jax.tree.map(np.asarray, case.operands)
    with enable_x64():
        wide = jax.tree.map(
            lambda x: jnp.asarray(x, "float64" if jnp.issubdtype(x.dtype, jnp.floating) else None),
            operands,
        )
        return jax.tree.map(np.asarray, value_and_grads(reference.attention, case, wide))


def assert_close(name: str, got, want, dtype: str) -> None:
    """Within the tolerance table; infinities must agree exactly."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (name, got.shape, want.shape)
    infinite = np.isinf(want)
    np.testing.assert_array_equal(got[infinite], want[infinite], err_msg=name)
    got, want = got[~infinite], want[~infinite]
    error = got - want
    kind = "leaf" if name.startswith("d_leaf") else "grad" if name.startswith("d_") else "out"
    rms, largest = TOLERANCES[dtype][kind]
    # A gradient can vanish altogether (a sink at −1e4): then it is compared with 1e-3.
    scale = max(np.sqrt(np.mean(want**2)), 1e-3)
    assert np.sqrt(np.mean(error**2)) <= rms * scale, (name, np.sqrt(np.mean(error**2)) / scale)
    top = max(np.abs(want).max(), 1e-3)
    assert np.abs(error).max() <= largest * top, (name, np.abs(error).max() / top)


def check(attention: Callable, case: Case) -> None:
    """The whole comparison for one implementation and one case."""
    got = value_and_grads(attention, case, case.operands)
    want = expected(case)
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_close(name, x, want[name], case.dtype)


def numpy_attention(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """out and lse in NumPy float64, row by row, written without a look at the library's formulas."""
    query, key, value, bias, mask, vis, sinks = jax.tree.map(np.asarray, case.operands)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    N, K = case.heads
    static = case.static
    out, lse = np.zeros((B, T, N, HV)), np.full((B, T, N), -np.inf)
    full = lambda x, shape: None if x is None else np.broadcast_to(x, shape)  # noqa: E731
    bias, mask = full(bias, (B, N, T, S)), full(mask, (B, N, T, S))
    kp, qp = full(vis.key_positions, (B, K, S)), full(vis.query_positions, (B, T))
    is_sink = full(vis.key_is_sink, (B, K, S))
    qs, ks = full(vis.query_segment_ids, (B, T)), full(vis.key_segment_ids, (B, S))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        k = n // (N // K)
        seen = []
        for j in range(S):
            distance = int(qp[b, t]) - int(kp[b, k, j])
            near = (vis.left is None or distance <= vis.left) and (
                vis.right is None or -distance <= vis.right
            )
            ok = kp[b, k, j] >= 0 and (near or (is_sink is not None and is_sink[b, k, j]))
            ok = ok and not (vis.is_causal and distance < 0)
            ok = ok and (qs is None or qs[b, t] == ks[b, j])
            ok = ok and (mask is None or mask[b, n, t, j])
            ok = ok and (vis.query_lengths is None or t < vis.query_lengths[b])
            ok = ok and (vis.key_lengths is None or j < vis.key_lengths[b])
            if ok:
                seen.append(j)
        x = np.array([query[b, t, n] @ key[b, j, k] * static["scale"] for j in seen])
        if static["logits_soft_cap"] is not None:
            x = static["logits_soft_cap"] * np.tanh(x / static["logits_soft_cap"])
        if bias is not None:
            x = x + np.array([np.float64(bias[b, n, t, j]) for j in seen])
        weights = np.zeros(len(seen))
        match static["normalizer"]:
            case normalizers.Sigmoid(bias=constant):
                weights = 1 / (1 + np.exp(-(x + constant)))
            case normalizers.Softpick(epsilon=epsilon):
                weights = np.maximum(np.expm1(x), 0) / (np.abs(np.expm1(x)).sum() + epsilon)
            case other:
                extra = {"softmax1": [0.0], "softmax_n(n=2.5)": [np.log(2.5)]}.get(str(other), [])
                if sinks is not None:
                    extra = [float(sinks[n] if sinks.ndim == 1 else sinks[b, t, n])]
                terms = np.concatenate([x, extra])
                if len(terms):
                    lse[b, t, n] = np.logaddexp.reduce(terms)
                    weights = np.exp(x - lse[b, t, n])
        if seen:
            out[b, t, n] = weights @ value[b, seen, k]
    return out, lse if static["normalizer"].has_log_sum_exp else None
