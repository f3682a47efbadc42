import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import (
    add_slot_values,
    cumulative_decay,
    decay_bias,
    dense_decay_bias,
    dot_product_attention,
    join_sinks,
    log_forget,
    slot_logits,
)
from sinkjax.ops.slots import Slots

B, T, N, K, H = 2, 11, 6, 2, 5
POSITIONS = np.stack([np.r_[:4, :7], [-1, 0, 1, -1, 2, 3, 4, -1, 5, 6, -1]])
SEGMENTS = np.stack([np.repeat([1, 2], [4, 7]), np.ones(11, int)])


def draw():
    normal = np.random.default_rng(0).standard_normal
    return {
        "query": jnp.asarray(normal((B, T, N, H)) * 2),
        "key": jnp.asarray(normal((B, T, K, H))),
        "value": jnp.asarray(normal((B, T, K, H))),
        "scores": jnp.asarray(normal((B, T, N))),
        "slot_key": jnp.asarray(normal((K, 2, H))),
        "slot_value": jnp.asarray(normal((K, 2, H))),
        "sinks": jnp.asarray(normal((N, 3))),
    }


def ours(x, kind):
    where = jnp.asarray(POSITIONS >= 0)
    bias, shift = decay_bias(cumulative_decay(log_forget(x["scores"], where)))
    slots = Slots(x["slot_key"], x["slot_value"]) if "slots" in kind else None
    logits = slot_logits(x["query"], slots)
    normalizer, joined = join_sinks(
        "softmax1" if "softmax1" in kind else "softmax",
        x["sinks"] if "sinks" in kind else None,
        logits,
        shift=shift,
    )
    index, segments = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
    out, lse = dot_product_attention(
        x["query"], x["key"], x["value"], bias, sinks=joined, normalizer=normalizer,
        is_causal=True, query_positions=index, key_positions=index,
        query_segment_ids=segments, key_segment_ids=segments, return_residual=True,
    )  # fmt: skip
    return add_slot_values(out, slots, logits, lse - shift, where=where)


def dense(x, kind):
    """Each weight times the product of the gates between its key and its query, pair by pair."""
    gates = jnp.where((POSITIONS >= 0)[..., None], jnp.log(jax.nn.sigmoid(x["scores"])), 0)
    t = np.arange(T)
    between = (t[None, None] > t[None, :, None]) & (t[None, None] <= t[:, None, None])
    products = jnp.exp(jnp.einsum("TSL,BLN->BTSN", between.astype(float), gates))
    key, value = (jnp.repeat(x[name], N // K, axis=2) for name in ("key", "value"))
    terms = jnp.exp(jnp.einsum("BTNH,BSNH->BTSN", x["query"], key) / H**0.5) * products
    distance = POSITIONS[:, :, None] - POSITIONS[:, None, :]
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (distance >= 0)
    seen &= (POSITIONS >= 0)[:, None, :]
    terms = jnp.where(seen[..., None], terms, 0)
    total, added = terms.sum(2), 0.0
    if "softmax1" in kind:
        total = total + 1
    if "sinks" in kind:
        total = total + jnp.exp(x["sinks"]).sum(-1)
    if "slots" in kind:
        slot_key, slot_value = (
            jnp.repeat(x[name], N // K, axis=0) for name in ("slot_key", "slot_value")
        )
        at_slots = jnp.exp(jnp.einsum("BTNH,NmH->BTNm", x["query"], slot_key) / H**0.5)
        total = total + at_slots.sum(-1)
        added = jnp.einsum("BTNm,Nmh->BTNh", at_slots, slot_value)
    safe = jnp.where(total > 0, total, 1)[..., None]
    out = (jnp.einsum("BTSN,BSNh->BTNh", terms, value) + added) / safe
    return jnp.where((POSITIONS >= 0)[..., None, None], out, 0)


@pytest.mark.parametrize("kind", ["softmax", "softmax1 and sinks and slots"])
def test_gates_multiply_the_weights(x64, kind):
    """Packed rows and padding in the midst, forward and backward; sinks and slots do not fade."""
    x = draw()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, H)))

    def pull(function):
        def both(x):
            out, back = jax.vjp(lambda x: function(x, kind), x)
            return out, back(cotangent)[0]

        return jax.jit(both)(x)

    (got, got_grads), (want, want_grads) = pull(ours), pull(dense)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    for name, gradient in got_grads.items():
        np.testing.assert_allclose(gradient, want_grads[name], rtol=0, atol=1e-12, err_msg=name)
    assert np.abs(got_grads["scores"][0]).max() > 0.01
    np.testing.assert_array_equal(got_grads["scores"][1, [0, 3, 7, 10]], 0)


def test_the_pieces():
    scores = jnp.asarray([[[0.0], [200.0], [-300.0], [1.0]]], jnp.bfloat16)
    gates = log_forget(scores, jnp.asarray([[True, True, True, False]]))
    assert gates.dtype == jnp.float32
    np.testing.assert_allclose(gates[0, :, 0], [np.log(0.5), 0, -300, 0], rtol=1e-6)
    decay = cumulative_decay(gates)
    bias, shift = decay_bias(decay)
    both = dense_decay_bias(decay)
    np.testing.assert_allclose(both[0, 0], np.asarray(bias[0, 0] - shift[0]), rtol=1e-6)
    np.testing.assert_allclose(both[0, 0, 2], [-300, -300, 0, 0], rtol=1e-6)
