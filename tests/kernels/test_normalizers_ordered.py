"""Stick-breaking: the product as printed, and the order of positions, not of the buffer."""

from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import reference
from sinkjax_kernels.normalizers import StickBreaking

weights = jax.jit(normalizers.weights, static_argnums=0)


def stick_breaking(x):
    out, left = [], Decimal(1)
    for v in reversed(x):
        share = 1 / (1 + (-v).exp())
        out.append(left * share)
        left *= 1 / (1 + v.exp())
    return out[::-1]


def test_formula(agree):
    agree({"stick_breaking": stick_breaking})


def test_keys_break_off_in_the_order_of_their_positions():
    """Shuffling buffer, mask and positions together shuffles the weights, and nothing else."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    where = jnp.asarray(rng.uniform(size=(3, 7)) < 0.7)
    order = rng.permutation(7)
    want, _ = weights(StickBreaking(), x, where)
    got, _ = weights(
        StickBreaking(), x[:, order], where[:, order], key_order=jnp.arange(7)[None][:, order]
    )
    np.testing.assert_allclose(got, want[:, order], rtol=1e-6)
    plain, _ = weights(StickBreaking(), x[:, order], where[:, order])
    assert np.abs(plain - got).max() > 0.01


def test_attention_over_shuffled_segments_per_head():
    """Against a double loop: per-head positions, segments, a window with sink tokens, gradients."""
    B, T, S, N, K, H = 2, 5, 7, 4, 2, 3
    rng = np.random.default_rng(1)
    query, key, value = (
        rng.normal(size=shape).astype(np.float32)
        for shape in [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    )
    places = rng.permuted(np.broadcast_to(np.arange(S) - 1, (B, K, S)), axis=-1)
    segments = np.array([[1, 1, 1, 2, 2, 1, 2], [1] * 7])
    rows = np.array([2, 3, 4, 5, 1])
    visibility = masks.build(
        (B, T, S, K), is_causal=True, local_window_size=(2, 0), num_sink_tokens=1,
        query_positions=jnp.asarray(rows), key_positions=jnp.asarray(places),
        query_segment_ids=jnp.ones((B, T), int), key_segment_ids=jnp.asarray(segments),
    )  # fmt: skip
    out, lse = reference.attention(
        jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), None, None, visibility, None,
        normalizer=StickBreaking(), scale=0.5, logits_soft_cap=None,
    )  # fmt: skip
    assert lse is None
    want = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        k, left = n // (N // K), 1.0
        for j in np.argsort(-places[b, k]):
            p = places[b, k, j]
            near = rows[t] - p <= 2 or p < 1
            if not (0 <= p < rows[t] and near and segments[b, j] == 1):
                continue
            share = 1 / (1 + np.exp(-0.5 * query[b, t, n] @ key[b, j, k]))
            want[b, t, n] += left * share * value[b, j, k]
            left *= 1 - share
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_positions_that_are_not_given_need_no_sorting():
    """The same weights as with the positions spelled out, without a gather."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 2, 3)), jnp.float32)

    def run(x, places):
        visibility = masks.build((1, 6, 6, 2), is_causal=True, key_positions=places)
        return reference.attention_weights(
            x, x, None, None, visibility, None,
            normalizer=StickBreaking(), scale=1.0, logits_soft_cap=None,
        )[0]  # fmt: skip

    plain = jax.jit(lambda x: run(x, None))
    np.testing.assert_allclose(plain(x), jax.jit(run)(x, jnp.arange(6)), atol=1e-7)
    assert "gather" not in str(jax.make_jaxpr(plain)(x))
    assert "gather" in str(jax.make_jaxpr(run)(x, jnp.arange(6)))


def test_the_newest_key_takes_all_it_wants():
    w, _ = weights(StickBreaking(), jnp.array([1e4, 1e4, -1e4, 1e4]), jnp.arange(4) != 3)
    np.testing.assert_array_equal(w, [0, 1, 0, 0])
    slope = jax.grad(lambda x: weights(StickBreaking(), x, x < 9)[0].sum())(jnp.full(4, -0.5))
    np.testing.assert_allclose(
        slope, np.full(4, (1 / (1 + np.exp(-0.5))) ** 4 / (1 + np.exp(0.5))), rtol=1e-5
    )
