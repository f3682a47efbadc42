"""Plain softmax against `torch.nn.functional.scaled_dot_product_attention`, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax import dot_product_attention
from sinkjax.ops.decode import decode_attention

# B, T, S, N, K, H, h; and how the call is made.
CASES = {
    "plain": ((2, 5, 7, 3, 3, 4, 6), {}),
    "causal": ((1, 5, 7, 3, 3, 4, 4), {"is_causal": True}),
    "causal_grouped": ((2, 7, 7, 6, 2, 4, 4), {"is_causal": True}),
    "scale": ((2, 5, 3, 4, 1, 6, 6), {"scale": 0.3}),
    "mask": ((2, 5, 7, 2, 2, 4, 4), {"mask": True}),
    "bias": ((2, 3, 5, 4, 2, 4, 4), {"bias": True}),
    "extreme": ((1, 5, 5, 2, 1, 4, 4), {"is_causal": True, "factor": 1e4}),
    "decode": ((3, 1, 7, 4, 2, 4, 6), {"decode": True}),
}

# One cache per row: slots in any order, empty ones, keys of the future; row 0 shows one key.
QUERY_POSITIONS = np.array([[0], [4], [6]])
KEY_POSITIONS = np.array(
    [[-1, -1, 0, -1, -1, -1, -1], [5, 2, -1, 4, 0, 3, 1], [6, 0, 1, 2, 3, 4, 5]]
)


def make(case):
    (B, T, S, N, K, H, h), how = CASES[case]
    rng = np.random.default_rng(list(case.encode()))

    def draw(*shape):
        return np.round(rng.normal(size=shape) * 64) / 64  # few digits: a small archive

    arrays = {
        "query": draw(B, T, N, H) * how.get("factor", 1),
        "key": draw(B, S, K, H),
        "value": draw(B, S, K, h),
        "cotangent": draw(B, T, N, h),
    }
    if "bias" in how:
        arrays["bias"] = draw(1, N, T, S)
    if "mask" in how:
        arrays["mask"] = rng.random((B, 1, T, S)) < 0.6
        arrays["mask"][0, 0, 1] = np.arange(S) == 3  # one visible key
        arrays["mask"][1, 0, 2] = False  # none
    if "decode" in how:
        arrays["query_positions"], arrays["key_positions"] = QUERY_POSITIONS, KEY_POSITIONS
    return arrays


def ours(case, **inputs):
    how = CASES[case][1]
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    cotangent = inputs.pop("cotangent")
    floats = {name: x for name, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    masks = {name: x for name, x in inputs.items() if name not in floats}

    def attend(query, key, value, **bias):
        if "decode" in how:
            keys, values = (jnp.swapaxes(x, 1, 2) for x in (key, value))
            return decode_attention(query, keys, values, **masks)
        options = {name: how[name] for name in ("is_causal", "scale") if name in how}
        return dot_product_attention(query, key, value, **bias, **masks, **options)

    @jax.jit
    def run(floats, cotangent):
        out, pull = jax.vjp(lambda floats: attend(**floats), floats)
        return {"out": out} | {f"grad_{name}": x for name, x in pull(cotangent)[0].items()}

    return jax.tree.map(np.asarray, run(floats, cotangent))


def theirs(case, peer, cotangent, mask=None, query_positions=None, key_positions=None, **floats):
    torch = peer("torch")
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in floats.items()}
    if query_positions is not None:
        seen = (key_positions >= 0) & (key_positions <= query_positions)
        mask = seen[:, None, None, :]
    how = CASES[case][1]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(leaves[name].transpose(1, 2) for name in ("query", "key", "value")),
        attn_mask=leaves.get("bias") if mask is None else torch.tensor(mask),
        is_causal=how.get("is_causal", False),
        scale=how.get("scale"),
        enable_gqa=True,
    ).transpose(1, 2)
    out.backward(torch.tensor(cotangent))
    grads = {f"grad_{name}": x.grad.numpy() for name, x in leaves.items()}
    return {"out": out.detach().numpy()} | grads


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, x64):
    inputs, results = golden.read(case)
    golden.agree(ours(case, **inputs), results)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_torch(case, golden, peer, x64):
    inputs = make(case)
    results = theirs(case, peer, **inputs)
    golden.settle(case, inputs, results)
    golden.agree(ours(case, **inputs), results)


def test_a_row_with_one_visible_key_is_its_value(golden):
    """What the peer says too: no gradient reaches the query, and 0 for a row that sees nothing."""
    inputs, results = golden.read("decode")
    np.testing.assert_array_equal(results["out"][0, 0, ::2], inputs["value"][0, 2])
    assert not results["grad_query"][0].any()
    _, results = golden.read("mask")
    assert not results["out"][1, 2].any() and not results["grad_query"][1, 2].any()
