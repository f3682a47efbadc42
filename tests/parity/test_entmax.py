"""Sparsemax and entmax against the `entmax` package of its authors, in float64.

The package sorts for sparsemax and 1.5-entmax and bisects for other alphas; it knows no masks, so that
a hidden key is a logit of minus infinity there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import dot_product_attention
from sinkjax_kernels import normalizers

# what is compared, our normaliser, the peer's function and its alpha
CASES = {
    "sparsemax": ("weights", "sparsemax", "sparsemax", {}),
    "entmax15": ("weights", "entmax15", "entmax15", {}),
    "entmax_bisect_1.2": ("weights", "entmax(alpha=1.2)", "entmax_bisect", {"alpha": 1.2}),
    "entmax_bisect_1.5": ("weights", "entmax(alpha=1.5)", "entmax_bisect", {"alpha": 1.5}),
    "entmax_bisect_1.8": ("weights", "entmax(alpha=1.8)", "entmax_bisect", {"alpha": 1.8}),
    "attention_sparsemax": ("attention", "sparsemax", "sparsemax", {}),
    "attention_entmax15": ("attention", "entmax15", "entmax15", {}),
}


def make(case):
    rng = np.random.default_rng(list(case.encode()))

    def draw(*shape):
        return np.round(rng.normal(size=shape) * 64) / 64  # few digits: a small archive

    if CASES[case][0] == "attention":
        B, T, N, K, H = 2, 7, 4, 2, 6
        return {
            "query": draw(B, T, N, H),
            "key": draw(B, T, K, H),
            "value": draw(B, T, K, H),
            "cotangent": draw(B, T, N, H),
        }
    S = 11
    index = np.arange(S)
    rows = {
        "small": draw(S) / 4,
        "usual": draw(S),
        "wide": draw(S) * 8,
        "one far above": np.where(index == 4, 1e4, draw(S)),
        "one far below": np.where(index == 4, -1e4, draw(S)),
        "all high, close": 1e4 + draw(S),
        "all low, close": -1e4 + draw(S),
        "far apart": np.where(index % 2, 1e4, -1e4),
        "all equal": np.full(S, 0.75),
        "all equal, high": np.full(S, 1e4),
        "ties at the top": np.where(index % 3, 0.25, 1.0),
        "ties below the top": np.where(index == 7, 1.0, np.where(index % 2, 0.5, -0.5)),
        "ties far below": np.where(index < 2, 3.0, -1e4),
        "some hidden": draw(S),
        "top hidden": np.where(index == 2, 1e4, draw(S)),
        "one visible": draw(S),
    }
    where = np.ones((len(rows), S), bool)
    names = list(rows)
    where[names.index("some hidden")] = index % 3 != 0
    where[names.index("top hidden")] = index != 2
    where[names.index("one visible")] = index == 5
    logits = np.stack(list(rows.values()))
    return {"logits": logits, "where": where, "cotangent": draw(*logits.shape)}


def ours(case, cotangent, **inputs):
    kind, normalizer, _, _ = CASES[case]
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    where = inputs.pop("where", None)

    def attend(**floats):
        if kind == "attention":
            return dot_product_attention(**floats, normalizer=normalizer, is_causal=True)
        return normalizers.weights(normalizers.resolve(normalizer), floats["logits"], where)[0]

    @jax.jit
    def run(floats, cotangent):
        out, pull = jax.vjp(lambda floats: attend(**floats), floats)
        return {"out": out} | {f"grad_{name}": x for name, x in pull(cotangent)[0].items()}

    return jax.tree.map(np.asarray, run(inputs, jnp.asarray(cotangent)))


def theirs(case, peer, cotangent, where=None, **floats):
    torch, entmax = peer("torch"), peer("entmax")
    kind, _, name, alpha = CASES[case]
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in floats.items()}
    if kind == "attention":
        T = floats["query"].shape[1]
        where = np.tri(T, dtype=bool)
        query, key, value = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    else:
        logits = leaves["logits"]
    logits = logits.masked_fill(torch.tensor(~where), -torch.inf)
    out = getattr(entmax, name)(logits, dim=-1, **alpha)
    if kind == "attention":
        out = (out @ value).transpose(1, 2)
    out.backward(torch.tensor(cotangent))
    grads = {f"grad_{name}": x.grad.numpy() for name, x in leaves.items()}
    return {"out": out.detach().numpy()} | grads


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, x64):
    inputs, results = golden.read(case)
    golden.agree(ours(case, **inputs), results)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_entmax(case, golden, peer, x64):
    inputs = make(case)
    results = theirs(case, peer, **inputs)
    golden.settle(case, inputs, results)
    golden.agree(ours(case, **inputs), results)
