"""Attention of rows that are cut over devices is that of one device, and moves what it says it moves."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters
from sinkjax.ops.attention import (
    attention_statistics,
    dot_product_attention,
    resolve_sequence,
)
from sinkjax.ops.sequence.rectangle import merge
from sinkjax.ops.sequence.ring import add_sinks
from sinkjax.sharding import batch_sharding, make_mesh, shardings
from sinkjax_kernels import normalizers

B, N, K, H, HV = 2, 4, 2, 5, 3
SIZES = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2, "u32": 4}


def segments(T, *rows):
    """Ids of packed rows from where segments begin; they do not count up."""
    ids = np.stack([np.cumsum(np.isin(np.arange(T), starts)) for starts in rows])
    return jnp.asarray((ids * 5 + 3) % 17)


WINDOW = {"local_window_size": (3, 0), "num_sink_tokens": 2}
CASES = {
    # Shards of 6 tokens. Segments begin at an edge, one token before one, and cross up to four.
    "halo": (8, 48, {"local_window_size": (8, 0), "num_sink_tokens": 3, "sinks": "N",
                     "segments": ([0, 5, 6, 7, 35], [0, 17, 18, 41])}),
    "ring": (8, 48, {"sinks": "N", "bias": 1,
                     "segments": ([0, 4, 5, 13, 24], [0, 10, 15, 40])}),
    "gather": (4, 24, {"normalizer": "sigmoid", "segments": ([0, 3, 4, 17],)}),
}  # fmt: skip
SLOW = {
    "halo, one row": (4, 24, WINDOW | {"sinks": "BTN"}),
    "halo, no sink tokens": (4, 24, {"local_window_size": (7, 0), "segments": ([0, 6, 9],)}),
    "halo, window 1": (4, 24, {"local_window_size": (0, 0), "num_sink_tokens": 1, "sinks": "N"}),
    "halo, window 1 alone": (4, 24, {"local_window_size": (0, 0)}),
    "halo, window of a shard": (4, 24, {"local_window_size": (6, 0), "num_sink_tokens": 1}),
    "halo, most sink tokens": (8, 48, WINDOW | {"num_sink_tokens": 14, "segments": ([0, 2, 26],)}),
    "halo, positions": (4, 24, WINDOW | {"positions": np.arange(1, 25)}),
    "halo, sigmoid": (4, 24, WINDOW | {"normalizer": "sigmoid", "segments": ([0, 3, 4, 17],)}),
    "halo, softpick": (4, 24, WINDOW | {"normalizer": "softpick", "segments": ([0, 3, 4, 17],)}),
    "halo, entmax": (4, 24, WINDOW | {"normalizer": "entmax15"}),
    "halo, cap and bias": (4, 24, WINDOW | {"logits_soft_cap": 2.0, "bias": 1, "sinks": "BTN",
                                            "segments": ([0, 3, 4, 17], [0, 11, 12, 13])}),
    "ring of 2": (2, 20, {"sinks": "BTN"}),
    "ring of 3": (3, 18, {"segments": ([0, 3, 4, 16],)}),
    "ring of 4": (4, 40, {"sinks": "N"}),
    "ring, softmax1": (4, 24, {"normalizer": "softmax1", "segments": ([0, 3, 4, 17],)}),
    "ring, sigsoftmax": (4, 24, {"normalizer": "sigsoftmax"}),
    "ring, softmax_n": (4, 24, {"normalizer": "softmax_n(n=3.0)", "num_sink_tokens": 3}),
    "ring, wide window": (4, 24, {"local_window_size": (23, 0), "num_sink_tokens": 3}),
    "ring, cap and bias": (4, 24, {"logits_soft_cap": 2.0, "bias": 1, "sinks": "N"}),
    "ring, padded by bias": (4, 24, {"sinks": "N", "bias": 1, "padded": 2}),
    "ring, full": (4, 24, {"is_causal": False, "sinks": "N", "segments": ([0, 3, 4, 17],)}),
    "gather, window": (4, 24, {"is_causal": False, "local_window_size": (3, 2), "bias": 24}),
    "gather, odd shards": (4, 20, {"sinks": "N"}),
    "gather, positions": (4, 24, WINDOW | {"positions": jnp.arange(24) // 2}),
    "gather, lengths": (4, 24, {"query_seq_lengths": jnp.array([20, 3]), "sinks": "BTN",
                                "key_value_seq_lengths": jnp.array([20, 5])}),
    "whole": (4, 22, {"sinks": "N"}),
}  # fmt: skip


def call_of(T, described, dtype="float32"):
    """Learned arrays, and the other arguments of a call."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays = {"query": draw(B, T, N, H), "key": draw(B, T, K, H), "value": draw(B, T, K, HV)}
    options = {"is_causal": True} | described
    if "sinks" in options:
        shape = options.pop("sinks")
        arrays["sinks"] = draw(*({"B": B, "T": T, "N": N}[x] for x in shape)) + 1
    if "bias" in options:
        arrays["bias"] = draw(1, N, options.pop("bias"), T)
    if "padded" in options:  # the first rows see nothing
        arrays["bias"] = arrays["bias"].at[..., : options.pop("padded")].set(-jnp.inf)
    if "segments" in options:
        ids = segments(T, *options.pop("segments"))
        options |= {"query_segment_ids": ids, "key_segment_ids": ids}
    if "positions" in options:
        options["query_positions"] = options["key_positions"] = options.pop("positions")
    return arrays, options


def loss_of(options):
    described = normalizers.resolve(options.get("normalizer", "softmax"))

    def loss(arrays):
        found = dot_product_attention(
            **arrays, **options, return_residual=described.has_log_sum_exp
        )
        out, lse = found if described.has_log_sum_exp else (found, jnp.zeros(1))
        return (jnp.sin(out) @ jnp.arange(1.0, 1 + HV)).sum() + jnp.cos(lse).sum(), (out, lse)

    return jax.value_and_grad(loss, has_aux=True)


def check(name, n, T, described, *, axes=None, explicit=False):
    """Compares with one device; returns the program for all of them."""
    arrays, options = call_of(T, described)
    (_, want), want_grads = jax.jit(loss_of(options))(arrays)
    with jax.set_mesh(make_mesh(**(axes or {}), sequence=n, explicit=explicit)):
        assert resolve_sequence(**arrays, **options).strategy == name
        program = jax.jit(loss_of(options)).lower(arrays).compile()
        (_, got), grads = program(arrays)
    pairs = zip(jax.tree.leaves((got, grads)), jax.tree.leaves((want, want_grads)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=3e-6)
    return program.as_text() or ""


def arrays_in(text, operation=r"[\w-]+"):
    """Sizes of what an operation of a program makes, one row of tokens and heads per device."""
    found = []
    for made in re.findall(rf"= ([^=]*?) {operation}\(", text):
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", made):
            if kind in SIZES:
                found.append((SIZES[kind], math.prod(int(x) for x in sizes.split(",") if x)))
    return found


def test_the_ring_is_balanced():
    """A contiguous ring computes two whole squares on each of two devices, half of all logits."""
    arrays, options = call_of(48, {})

    def operations(n):
        def run(arrays):
            return dot_product_attention(**arrays, **options, implementation="reference")

        with jax.set_mesh(make_mesh(sequence=n)):
            found = jax.jit(run).lower(arrays).compile().cost_analysis()
        assert found is not None
        return found["flops"]

    assert operations(2) < 0.45 * operations(1)


def test_a_window_moves_only_itself_and_its_sink_tokens():
    n, T, described = CASES["halo"]
    text = check("halo", n, T, described)
    assert "all-gather" not in text and "all-to-all" not in text
    assert "reduce-scatter" not in text
    P, near, steps = 3, 8, 4  # sink tokens, W − 1, and 1 + ⌈log2(n − 1)⌉
    keys = 4 * K * (H + HV)
    # Forward and backward; besides keys, where segments begin, the last id and an extent per step.
    most = B * (2 * keys * (near + steps * P) + near + 4 + 8 * steps)
    moved = [size * number for size, number in arrays_in(text, "collective-permute")]
    assert B * 2 * keys * near < sum(moved) <= most
    # What is summed over devices does not grow with T: the loss and the gradient of the sinks.
    assert all(number <= N for _, number in arrays_in(text, "all-reduce"))


def test_a_ring_holds_no_more_than_two_shards():
    n, T, described = CASES["ring"]
    text = check("ring", n, T, described)
    assert "all-gather" not in text and "collective-permute" in text
    most = max(number for _, number in arrays_in(text))
    assert most <= 2 * B * (T // n) * N * H < (n - 1) * B * (T // n) * K * H


def test_what_else_there_is_is_gathered(caplog):
    n, T, described = CASES["gather"]
    text = check("gather", n, T, described, axes={"data": 2}, explicit=True)
    assert "all-gather" in text
    assert [r.message for r in caplog.records] == [
        "attention: each device along `sequence` takes all keys: sigmoid has no log-sum-exp to "
        "merge partial rows by"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_one_device(name):
    n, T, described = SLOW[name]
    check(re.split(r"\W", name)[0], n, T, described)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_beside_other_axes(name, explicit):
    """Two shards of tokens, two of the batch, two of heads."""
    _, T, described = CASES[name]
    check(name, 2, T, described, axes={"data": 2, "model": 2}, explicit=explicit)


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True])
def test_statistics_take_whole_rows(explicit):
    arrays, options = call_of(24, {"sinks": "N", "segments": ([0, 3, 4, 17],)})
    del arrays["value"]
    run = jax.jit(lambda arrays: attention_statistics(**arrays, **options))
    want = run(arrays)
    mesh = make_mesh(2, sequence=4, explicit=explicit)
    rows = jax.NamedSharding(mesh, jax.P("data", "sequence", None, None))
    arrays |= {name: jax.device_put(arrays[name], rows) for name in ("query", "key")}
    with jax.set_mesh(mesh):
        got = run(arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halo", "ring"])
def test_bfloat16(name):
    n, T, described = CASES[name]
    arrays, options = call_of(T, described, "bfloat16")
    (_, (want, want_lse)), want_grads = jax.jit(loss_of(options))(arrays)
    with jax.set_mesh(make_mesh(sequence=n)):
        (_, (out, lse)), grads = jax.jit(loss_of(options))(arrays)
    assert out.dtype == want.dtype == "bfloat16" and lse.dtype == "float32"
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves((out, grads)), jax.tree.leaves((want, want_grads)), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=3e-2, atol=6e-2)


def test_the_ways_that_go_wrong():
    """What two shards give where each counts the sink, or knows the sink tokens of its neighbour only."""
    T, W, P = 12, 3, 1
    shard = (slice(0, T // 2), slice(T // 2, T))
    arrays, _ = call_of(T, {"sinks": "N"})
    sinks = arrays.pop("sinks")

    def attend(keys, **options):
        """The last query over some of the keys."""
        given = {x: arrays[x][:, keys] for x in ("key", "value")}
        return dot_product_attention(
            arrays["query"][:, -1:], **given, is_causal=True, implementation="reference",
            query_positions=np.array([T - 1]), key_positions=np.arange(T)[keys], **options,
        )  # fmt: skip

    def merged(sinks):
        parts = [attend(keys, sinks=sinks, return_residual=True) for keys in shard]
        return merge(*parts[0], *parts[1])

    @jax.jit
    def compute(sinks):
        whole = attend(slice(0, T), sinks=sinks, return_residual=True)
        window = {"local_window_size": (W - 1, 0), "num_sink_tokens": P}
        forgotten = [attend(keys, **window) for keys in (slice(0, T), shard[1])]
        return whole, merged(sinks), add_sinks(*merged(None), sinks), forgotten

    whole, wrong, right, (remembered, forgotten) = compute(sinks)
    for a, b, c in zip(whole, wrong, right, strict=True):
        assert np.abs(a - b).max() > 0.05
        np.testing.assert_allclose(c, a, rtol=1e-5, atol=1e-6)
    assert np.abs(remembered - forgotten).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True])
def test_a_decoder_equals_that_of_one_device(explicit):
    config = DecoderConfig(
        vocab_size=37, model_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=20, context_length=64, windows=(5, None), sinks=True, num_sink_tokens=2,
        scan_layers=True,
    )  # fmt: skip
    T = 32
    params = parameters(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 37, (4, T))
    ids = np.stack([np.cumsum(np.isin(np.arange(T), [0, at, at + 1])) for at in (7, 8, 17, 25)])

    def loss(params, tokens, ids):
        logits = from_parameters(config, params)(tokens, segment_ids=ids).logits
        return jnp.sin(logits).mean() * 100

    run = jax.jit(jax.value_and_grad(loss))
    want, want_grads = run(params, tokens, ids)
    mesh = make_mesh(2, sequence=4, explicit=explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        tokens, ids = (jax.device_put(x, batch_sharding(mesh)) for x in (tokens, ids))
        program = run.lower(params, tokens, ids).compile()
        got, grads = program(params, tokens, ids)
    assert "collective-permute" in program.as_text()
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
