"""Tokens cut over devices: which strategy serves a call, and its parts that need no mesh.

What comes out on a mesh is in `tests/devices/test_sequence_devices.py`.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax.ops import sequence
from sinkjax.ops.attention import IMPLEMENTATIONS, dot_product_attention, resolve_sequence
from sinkjax.ops.dispatch import Implementation
from sinkjax.ops.sequence.carry import join, summarise
from sinkjax.ops.sequence.rectangle import rectangular
from sinkjax.sharding import make_mesh
from sinkjax_kernels import masks, normalizers

B, T, N, K, H = 2, 24, 4, 2, 5
CAUSAL = {"is_causal": True}
WINDOW = CAUSAL | {"local_window_size": (3, 0)}
IDS = jax.ShapeDtypeStruct((B, T), "int32")
LENGTHS = jax.ShapeDtypeStruct((B,), "int32")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, "float32")


@pytest.mark.parametrize(
    ("strategy", "reason", "options", "shards"),
    [
        ("whole", "no mesh axis", CAUSAL, 1),
        ("whole", "24 queries do not divide by 5", CAUSAL, 5),
        ("halo", "window of 4 keys", WINDOW, 4),
        ("halo", "window of 4", WINDOW | {"query_segment_ids": IDS, "key_segment_ids": IDS}, 4),
        ("halo", "window of 4", WINDOW | {"sinks": shape(B, T, N), "num_sink_tokens": 30}, 4),
        ("halo", "window of 4", WINDOW | {"bias": shape(N, 1, T), "normalizer": "softpick"}, 4),
        ("halo", "window of 18", CAUSAL | {"local_window_size": (17, 0)}, 4),
        ("gather", "reaches every shard", CAUSAL | {"local_window_size": (18, 0)}, 4),
        ("ring", "before a query", CAUSAL | {"local_window_size": (23, 0)}, 4),
        ("ring", "before a query", CAUSAL | {"num_sink_tokens": 3, "sinks": shape(N)}, 4),
        ("ring", "every key", {}, 8),
        ("gather", "3 tokens per shard", CAUSAL, 8),
        ("gather", "later keys", {"local_window_size": (3, 0)}, 4),
        ("gather", "no log-sum-exp", CAUSAL | {"normalizer": "sigmoid"}, 4),
        ("gather", "mask array", CAUSAL | {"mask": jax.ShapeDtypeStruct((T, T), "bool")}, 4),
        ("gather", "same for all queries", CAUSAL | {"bias": shape(T, T)}, 4),
        ("gather", "not those of the keys", CAUSAL | {"query_positions": np.arange(1, T + 1)}, 4),
        ("gather", "known to be", WINDOW | {"query_positions": IDS, "key_positions": IDS}, 4),
        ("gather", "lengths", WINDOW | {"key_value_seq_lengths": LENGTHS}, 4),
        ("gather", "by an array", WINDOW | {"key_is_sink": jax.ShapeDtypeStruct((T,), "bool")}, 4),
    ],
)
def test_plan(strategy, reason, options, shards):
    plan = resolve_sequence(
        shape(B, T, N, H), shape(B, T, K, H), shape(B, T, K, H), **options, shards=shards
    )
    assert plan.strategy == strategy and reason in plan.reason


def test_segments_of_two_arrays_are_not_taken_for_one():
    ids = {"query_segment_ids": IDS, "key_segment_ids": jax.ShapeDtypeStruct((B, T), "int32")}
    plan = resolve_sequence(shape(B, T, N, H), *[shape(B, T, K, H)] * 2, **WINDOW, **ids, shards=4)
    assert plan.strategy == "gather" and "segment ids" in plan.reason


def test_a_fallback_is_said_once(caplog):
    for reason, times in (("of one kind", 2), ("of another", 1)):
        for _ in range(times):
            sequence.tell(sequence.Plan("gather", reason))
    sequence.tell(sequence.Plan("halo", "nothing to say"))
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert "of one kind" in caplog.records[0].message


def test_summaries_join_to_that_of_all_tokens():
    """However the tokens are cut; the first tokens of the last segment are found from where it began."""
    rng, P = np.random.default_rng(0), 5
    begins = rng.random((40, 18)) < 0.12
    begins[:, 0] = True
    tokens = rng.normal(size=(40, 18, 3)).astype(np.float32)
    part = jax.jit(summarise, static_argnums=2)
    parts = [part(begins[:, i : i + 3], [tokens[:, i : i + 3]], P) for i in range(0, 18, 3)]
    left = functools.reduce(jax.jit(join), parts)
    right = functools.reduce(lambda x, y: jax.jit(join)(y, x), parts[::-1])
    for row in range(40):
        start = np.flatnonzero(begins[row])[-1]
        want = tokens[row, start:][:P]
        for found in (left, right):
            assert list(found.extent[row]) == [18 - start, 1]
            np.testing.assert_array_equal(found.tokens[row, : len(want)], want)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(None, id="one row", marks=pytest.mark.slow),
        pytest.param((7, 7), id="one document"),
        pytest.param((7, 4), id="two", marks=pytest.mark.slow),
    ],
)
def test_a_square_is_two_triangles(lengths):
    """Output, log-sum-exp and gradients of a kernel that is built for causal masks only."""
    exact = IMPLEMENTATIONS["reference"].run

    def refuse(*, visibility, query, **call):
        if not visibility.is_causal or query.dtype != jnp.float32:
            raise NotImplementedError("not causal in float32")

    def run(**call):
        assert call["visibility"].is_causal
        return exact(**call)

    size, rng = 7, np.random.default_rng(0)
    arrays = {
        name: jnp.asarray(rng.normal(size=(B, size, heads, H)), jnp.float32)
        for name, heads in (("query", N), ("key", K), ("value", K))
    }
    packed = {}
    if lengths:  # of the document to which all keys belong, in either row
        ids = jnp.stack([jnp.where(jnp.arange(size) < n, 3, 8) for n in lengths])
        packed = {"query_segment_ids": ids, "key_segment_ids": jnp.full_like(ids, 3)}
    call = {
        "bias": None, "mask": None, "sinks": None, "normalizer": normalizers.resolve("softmax"),
        "scale": 0.3, "logits_soft_cap": None,
        "visibility": masks.build((B, size, size, K), **packed),
    }  # fmt: skip
    table = {"kernel": Implementation(run, refuse, "tpu"), "xla": Implementation(exact)}
    known = rectangular(table)["kernel"]
    assert known.check is not None
    known.check(**call, **arrays)
    with pytest.raises(NotImplementedError, match="float32"):
        known.check(**call, **arrays | {"query": arrays["query"].astype(jnp.bfloat16)})
    with pytest.raises(NotImplementedError, match="bias"):
        known.check(**call | {"bias": jnp.ones((1, 1, 1, size))}, **arrays)

    def loss(run):
        def of(arrays):
            out, lse = run(**call, **arrays)
            seen = jnp.where(lse == -jnp.inf, 0, jnp.cos(lse))
            return jnp.sin(out).sum() + seen.sum(), (out, lse)

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    want, got = loss(exact)(arrays), loss(known.run)(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


AHEAD = {
    # options, whether packed, kernels of forward and backward, most memory in queries of a shard
    "halo": ({"local_window_size": (1023, 0), "num_sink_tokens": 4}, False, 2, 7),
    "ring": ({}, False, 6, 20),
    "packed ring": ({}, True, 6, 36),
}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", AHEAD)
def test_four_chips_hold_their_own_tokens(name, monkeypatch):
    """Gradients of 32,768 tokens on v5p: kernels serve all blocks, memory is that of a shard."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    options, is_packed, kernels, most = AHEAD[name]
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh(sequence=4, devices=devices)

    def given(*sizes, dtype="bfloat16", spec=(None, "sequence")):
        placed = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)

    def loss(query, key, value, sinks, ids):
        packed = {"query_segment_ids": ids, "key_segment_ids": ids} if is_packed else {}
        out: Any = dot_product_attention(
            query, key, value, sinks=sinks, is_causal=True, **options, **packed
        )
        return out.astype(jnp.float32).sum()

    length = 32768
    arrays = given(1, length, 8, 128), *[given(1, length, 2, 128)] * 2
    arrays += given(8, dtype="float32", spec=()), given(1, length, dtype="int32")
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    assert "all-gather" not in text and "collective-permute-start" in text
    assert memory is not None
    shard = 8 * 128 * 2 * length // 4  # bytes of the queries of a chip
    assert memory.temp_size_in_bytes < most * shard
