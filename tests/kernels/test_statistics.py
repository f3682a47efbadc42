"""Attention statistics: from a NumPy loop, blockwise against dense, with and without a log-sum-exp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import reference as flash
from sinkjax_kernels.statistics import reference, xla

B, T, S, N, K, H = 2, 11, 13, 6, 3, 5


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(B, T, N, H), (B, S, K, H)]
    )
    bias = jnp.asarray(rng.normal(size=(1, N, T, S)), jnp.float32)
    mask = jnp.asarray(rng.uniform(size=(B, 1, T, S)) < 0.8).at[:, :, 4].set(False)
    slots = np.broadcast_to(np.arange(S, dtype=np.int32), (B, K, S))
    visibility = masks.build(
        (B, T, S, K), is_causal=True, local_window_size=(5, 0), num_sink_tokens=2,
        query_positions=np.arange(T, dtype=np.int32) + 2,
        key_positions=jnp.asarray(rng.permuted(slots, axis=-1)),
    )  # fmt: skip
    return query, key, bias, mask, visibility


CHOICES = [
    ("softmax", None), ("softmax", (N,)), ("softmax", (B, T, N)), ("softmax1", None),
    ("sigmoid(bias=-1.0)", None), ("softpick", None), ("sigsoftmax", None), ("cog", None),
    ("elastic_softmax(offset=-0.5)", "learned"), ("stick_breaking", None), ("entmax15", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sinks_shape"), CHOICES, ids=str)
def test_statistics(operands, name, sinks_shape):
    query, key, bias, mask, visibility = operands
    sinks = None
    static = {"normalizer": normalizers.resolve(name), "scale": 0.6, "logits_soft_cap": 2.0}
    if sinks_shape == "learned":
        static["normalizer_params"] = {"offset": jnp.linspace(-0.3, 0.4, N)}
    elif sinks_shape is not None:
        sinks = jnp.asarray(np.random.default_rng(1).normal(size=sinks_shape), jnp.float32)
    weights, lse = flash.attention_weights(query, key, bias, mask, visibility, sinks, **static)
    logits, where = flash.logits_and_mask(
        query, key, bias, mask, visibility, scale=0.6, logits_soft_cap=2.0
    )
    if name == "stick_breaking":  # blind to the query's own position
        own = (
            visibility.query_positions[:, None, :, None]
            == jnp.repeat(visibility.key_positions, N // K, axis=1)[:, :, None]
        )
        where = where & ~own
    w, x, m = (np.asarray(a, np.float64) for a in (weights, logits, where))
    row, size = w.sum(-1), np.abs(w).sum(-1)
    share = np.abs(w) / np.where(size > 0, size, 1)[..., None]
    want = {
        "key_mass": w.sum(-2),
        "key_mass_normalized": share.sum(-2),
        "key_count": m.sum(-2),
        "row_mass": row,
        "sink_mass": np.where(m.any(-1), 1 - row, 1.0),
        "entropy": -(share * np.log(np.where(share > 0, share, 1))).sum(-1),
        "max_logit": np.where(m.any(-1), np.where(m > 0, x, -np.inf).max(-1), -np.inf),
    }
    if name != "softmax1" and sinks is None:
        want["sink_mass"] = np.zeros_like(row)  # no sink term, so no mass on it
    args = (query, key, bias, mask, visibility, sinks)
    blockwise = functools.partial(xla.attention_statistics, block_q=4)
    runs = {
        "dense": reference.attention_statistics(*args, **static),
        "blockwise": jax.jit(lambda *a: blockwise(*a, **static))(*args),
    }
    if lse is not None:
        runs["blockwise from lse"] = blockwise(*args, lse, **static)
        runs["dense from lse"] = reference.attention_statistics(*args, lse, **static)
    for run, got in runs.items():
        for field, expected in want.items():
            np.testing.assert_allclose(
                getattr(got, field), expected, atol=2e-5, err_msg=f"{run}: {field}"
            )


def test_memory_is_linear_in_the_keys():
    """Only one block of rows is ever held: no value with T times S elements."""
    T, S = 700, 1100
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(1, T, 1, H), (1, S, 1, H)]
    )
    text = str(
        jax.make_jaxpr(
            lambda q, k: xla.attention_statistics(
                q, k, None, None, masks.build((1, T, S, 1), is_causal=True), None,
                normalizer=normalizers.Softmax(), scale=1.0, logits_soft_cap=None,
            )
        )(query, key)
    )  # fmt: skip
    assert f"128,{S}" in text and f"{T},{S}" not in text and f"768,{S}" not in text
