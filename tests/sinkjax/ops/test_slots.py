"""Slots are attention over the concatenated keys, and every sink is a slot."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import (
    add_slot_values,
    dot_product_attention,
    join_sinks,
    slot_logits,
)
from sinkjax.ops.slots import Slots

B, T, N, K, H, h = 2, 13, 6, 2, 5, 3
# Row 0: segments of 4, 6 and 3 tokens; row 1: one of 11 and two of padding.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [4, 6, 3]), np.repeat([1, 0], [11, 2])])
INDEX = np.stack([np.r_[:4, :6, :3], np.r_[:11, -1, -1]])
CAP, SCALE = 2.0, 0.7


def draw(m):
    normal = np.random.default_rng(m).standard_normal
    return {
        "query": jnp.asarray(normal((B, T, N, H)) * 2),
        "key": jnp.asarray(normal((B, T, K, H))),
        "value": jnp.asarray(normal((B, T, K, h))),
        "slot_key": jnp.asarray(normal((K, m, H))),
        "slot_value": jnp.asarray(normal((K, m, h))),
        "sinks": jnp.asarray(normal((N, 2))),
    }


def packed(window) -> dict[str, Any]:
    return dict(
        is_causal=True,
        local_window_size=(window - 1, 0),
        query_positions=jnp.asarray(INDEX),
        key_positions=jnp.asarray(INDEX),
        query_segment_ids=jnp.asarray(SEGMENTS),
        key_segment_ids=jnp.asarray(SEGMENTS),
    )


def visible(window):
    distance = INDEX[:, :, None] - INDEX[:, None, :]
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    return same & (distance >= 0) & (distance < window) & (INDEX[:, None, :] >= 0)


def with_slots(x, mode, *, sinks=None, where=None, normalizer="softmax", **options):
    """The few lines of a layer."""
    slots = Slots(x["slot_key"], x["slot_value"], mode)
    common = {"scale": SCALE, "logits_soft_cap": CAP}
    logits = slot_logits(x["query"], slots, **common)
    normalizer, joined = join_sinks(normalizer, sinks, logits if slots.competes else None)
    out, lse = dot_product_attention(
        x["query"], x["key"], x["value"], sinks=joined, normalizer=normalizer,
        return_residual=True, **common, **options,
    )  # fmt: skip
    return add_slot_values(out, slots, logits, lse, where=where)


@functools.partial(jax.jit, static_argnames="mode")
def in_packed_rows(x, mode):
    return with_slots(x, mode, **packed(4))


@functools.partial(jax.jit, static_argnames="normalizer")
def without_slots(x, sinks=None, normalizer="softmax"):
    options = packed(4) | {"scale": SCALE, "logits_soft_cap": CAP, "normalizer": normalizer}
    return dot_product_attention(x["query"], x["key"], x["value"], sinks=sinks, **options)


def dense_logits(query, key):
    """[B, T, N, S] of keys [B, S, K, H]."""
    key = jnp.repeat(key, N // K, axis=2)
    return CAP * jnp.tanh(SCALE * jnp.einsum("BTNH,BSNH->BTNS", query, key) / CAP)


def concatenated(x, where, *, sinks=None):
    """One softmax over [slots, keys, sinks]; the slots visible to every query."""
    m = x["slot_key"].shape[1]

    def beside(slots, keys):
        slots = jnp.broadcast_to(slots.swapaxes(0, 1), (B, m, *keys.shape[2:]))
        return jnp.concatenate([slots, keys], axis=1)

    logits = dense_logits(x["query"], beside(x["slot_key"], x["key"]))
    seen = jnp.concatenate([np.ones((B, T, m), bool), where], axis=-1)[:, :, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    columns = logits.shape[-1]
    if sinks is not None:
        extra = jnp.broadcast_to(sinks, (B, T, N, sinks.shape[-1]))
        logits = jnp.concatenate([logits, extra], axis=-1)
    weights = jax.nn.softmax(logits)[..., :columns]
    value = jnp.repeat(beside(x["slot_value"], x["value"]), N // K, axis=2)
    return jnp.einsum("BTNS,BSNh->BTNh", weights, value)


@pytest.mark.parametrize(("m", "learned"), [(1, False), (3, True)])
def test_slots_are_concatenated_keys(x64, m, learned):
    """Packed segments and a window: one slot per segment, seen from beyond the window."""
    x, where = draw(m), visible(4)
    cotangent = jnp.asarray(np.random.default_rng(9).standard_normal((B, T, N, h)))

    def ours(x):
        return with_slots(x, "key_value", sinks=x["sinks"] if learned else None, **packed(4))

    def dense(x):
        return concatenated(x, where, sinks=x["sinks"] if learned else None)

    def pull(function):
        return jax.jit(lambda x: (function(x), jax.vjp(function, x)[1](cotangent)))(x)

    (got, got_grads), (want, want_grads) = pull(ours), pull(dense)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    for name, gradient in got_grads[0].items():
        np.testing.assert_allclose(gradient, want_grads[0][name], rtol=0, atol=1e-12, err_msg=name)
        assert (np.abs(gradient).max() > 0.01) == (learned or name != "sinks"), name


def test_three_names_for_one_sink(x64):
    """softmax1 = a slot with key 0 and value 0 = a sink logit of 0 = two of them at −log 2."""
    x = draw(1)
    zeros = x | {"slot_key": 0 * x["slot_key"], "slot_value": 0 * x["slot_value"]}
    want = without_slots(x, normalizer="softmax1")
    halves: Any = join_sinks("softmax", jnp.full((N, 2), -np.log(2)))[1]
    assert np.abs(want - without_slots(x)).max() > 0.01
    for same in (
        in_packed_rows(zeros, "key_value"),
        in_packed_rows(zeros, "key"),
        without_slots(x, jnp.zeros((B, T, N))),
        without_slots(x, jnp.broadcast_to(halves, (B, T, N))),
    ):
        np.testing.assert_allclose(same, want, rtol=0, atol=1e-12)


def test_a_key_slot_is_a_sink_logit_per_token(x64):
    x = draw(1)
    per_token = dense_logits(x["query"], x["slot_key"].swapaxes(0, 1)[None])[..., 0]
    want = without_slots(x, per_token)
    np.testing.assert_allclose(in_packed_rows(x, "key"), want, rtol=0, atol=1e-12)


def test_one_slot_per_packed_segment(x64):
    """A segment of a packed row is that segment alone with the slots."""
    x = draw(1)
    begin, end = 4, 10
    alone = x | {name: x[name][:1, begin:end] for name in ("query", "key", "value")}
    part = jax.jit(lambda x: with_slots(x, "key_value", is_causal=True, local_window_size=(3, 0)))(
        alone
    )
    whole = in_packed_rows(x, "key_value")
    np.testing.assert_allclose(whole[:1, begin:end], part, rtol=0, atol=1e-12)


def test_context_takes_no_weight_from_the_keys(x64):
    """o + softmax([k'; K]) · [v'; 0]: with o the attention without slots."""
    x, where = draw(3), visible(4)
    second = jax.jit(concatenated)(x | {"value": 0 * x["value"]}, where)
    got = in_packed_rows(x, "context")
    np.testing.assert_allclose(got, without_slots(x) + second, rtol=0, atol=1e-12)
    # Padding sees no key, but the slots, unless the caller says that it is padding.
    np.testing.assert_allclose(got[1, 11:], second[1, 11:], rtol=0, atol=1e-12)
    slots = Slots(x["slot_key"], x["slot_value"])
    logits: Any = slot_logits(x["query"], slots)
    lse = jax.nn.logsumexp(logits, axis=-1)
    added = add_slot_values(0 * got, slots, logits, lse, where=jnp.asarray(INDEX >= 0))
    np.testing.assert_array_equal((np.asarray(added) != 0).all((2, 3)), INDEX >= 0)


def test_a_value_slot_is_added():
    x = draw(3)
    slots = Slots(None, x["slot_value"], "value")
    assert slot_logits(x["query"], slots) is None and not slots.reads_lse and not slots.competes
    out = jnp.zeros((B, T, N, h), jnp.bfloat16)
    added = add_slot_values(out, slots, None, None)
    want = np.repeat(np.asarray(x["slot_value"]).sum(1), N // K, axis=0)
    assert added.dtype == jnp.bfloat16
    np.testing.assert_allclose(added, np.broadcast_to(want, added.shape), rtol=1e-2)
    assert add_slot_values(out, None, None, None) is out
    assert add_slot_values(out, Slots(x["slot_key"], None, "key"), None, None) is out


def test_what_joins(x64):
    rng = np.random.default_rng(4)
    terms = [rng.standard_normal(shape) for shape in ((N,), (N, 2), (B, T, N), (B, T, N, 3))]
    shift = rng.standard_normal((B, T, N))
    both: Any = join_sinks(
        "softmax_n(n=2.5)", None, *map(jnp.asarray, terms), shift=jnp.asarray(shift)
    )
    normalizer, joined = both
    total = np.exp(terms[0]) + np.exp(terms[1]).sum(-1) + np.exp(terms[2]) + 2.5
    want = np.log(total + np.exp(terms[3]).sum(-1)) + shift
    assert str(normalizer) == "softmax"
    np.testing.assert_allclose(joined, want, rtol=0, atol=1e-12)
    for name in ("softmax1", "sigmoid", "softpick"):
        normalizer, joined = join_sinks(name, None)
        assert (str(normalizer), joined) == (name, None)
    # softmax does not notice a shift; the constant of softmax1 moves with it.
    assert join_sinks("softmax", shift=jnp.asarray(shift))[1] is None
    normalizer, joined = join_sinks("softmax1", shift=jnp.asarray(shift))
    assert str(normalizer) == "softmax"
    np.testing.assert_array_equal(joined, shift)


def test_huge_logits_neither_overflow_nor_vanish():
    x = {name: jnp.asarray(value, jnp.float32) for name, value in draw(1).items()}
    slots = Slots(x["slot_key"] * 1e4, x["slot_value"])
    logits: Any = slot_logits(x["query"], slots)
    joined: Any = join_sinks("softmax", logits)[1]
    lse = jnp.logaddexp(joined, 0.5)
    added = np.asarray(add_slot_values(jnp.zeros((B, T, N, h)), slots, logits, lse))
    value = np.repeat(np.asarray(x["slot_value"])[:, 0], N // K, axis=0)
    value = np.broadcast_to(value, added.shape)
    wins, loses = np.asarray(logits)[..., 0] > 100, np.asarray(logits)[..., 0] < -200
    assert wins.any() and loses.any()
    np.testing.assert_allclose(added[wins], value[wins], rtol=1e-5)
    np.testing.assert_array_equal(added[loses], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: slot_logits(x["query"], Slots(jnp.zeros((K, 1, 7)), None, "key")),
            r"slots.key: expected \[K, m, H=5\] .* \(2, 1, 7\)",
        ),
        (
            lambda x: slot_logits(x["query"], Slots(jnp.zeros((4, 1, H)), None, "key")),
            "slots.key: .* dividing N=6",
        ),
        (
            lambda x: add_slot_values(x["query"], Slots(None, jnp.zeros((K, 1, 7)), "value"), None, None),
            r"slots.value: expected \[K, m, h=5\]",
        ),
        (
            lambda x: add_slot_values(x["query"], Slots(None, jnp.zeros((K, 1, H))), None, None),
            "lse: expected .*'key_value'",
        ),
        (lambda x: join_sinks("softpick", jnp.zeros(N)), "expected softmax, .* got softpick"),
        (lambda x: join_sinks("sigmoid", shift=jnp.zeros((B, T, N))), "got sigmoid"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(1))


def test_an_unknown_mode():
    slots = Slots(jnp.zeros((K, 1, H)), None, "key")
    object.__setattr__(slots, "mode", "keys")
    with pytest.raises(ValueError, match="slots.mode: expected one of key, value, .*'keys'"):
        slot_logits(jnp.zeros((B, T, N, H)), slots)
