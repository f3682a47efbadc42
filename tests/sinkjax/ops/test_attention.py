"""dot_product_attention: the contract with jax.nn, what is added, and what is refused."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sinkjax
from sinkjax.ops import attention
from sinkjax.ops.attention import attention_statistics, attention_weights, dot_product_attention
from sinkjax.ops.decode import decode_attention
from sinkjax.ops.dispatch import Implementation
from sinkjax_kernels import normalizers

B, T, S, N, K, H = 2, 7, 11, 6, 3, 5


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def legal_calls():
    """Options of jax.nn.dot_product_attention: each alone, and all pairs of different names."""
    rng = np.random.default_rng(1)
    options = [
        {"is_causal": True},
        {"scale": 0.3},
        {"local_window_size": 2},
        {"local_window_size": (3, 1)},
        {"query_seq_lengths": jnp.array([T, T])},
        {"key_value_seq_lengths": jnp.array([S - 2, 7])},
        {"bias": jnp.asarray(rng.normal(size=(B, N, T, S)), jnp.float32)},
        {"bias": jnp.asarray(rng.normal(size=(N, 1, S)), jnp.float32)},
        {"mask": jnp.asarray(rng.uniform(size=(1, 1, T, S)) < 0.6).at[..., 0].set(True)},
        {"mask": jnp.asarray(rng.uniform(size=(B, 1, 1, S)) < 0.8).at[..., 0].set(True)},
        {},
    ]
    for a, b in itertools.combinations(options, 2):
        if not set(a) & set(b):
            yield a | b


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_legal_jax_calls_mean_the_same(qkv, implementation):
    calls = list(legal_calls())
    assert len(calls) > 40
    if implementation == "xla":  # held to the reference by the conformance suite already
        calls = calls[::3]
    for options in calls:
        want, want_lse = jax.nn.dot_product_attention(*qkv, **options, return_residual=True)
        out, lse = dot_product_attention(
            *qkv, **options, return_residual=True, implementation=implementation
        )
        # jax.nn fills rows that see nothing with the mean of the values; here they are exactly 0.
        seen = np.isfinite(np.asarray(lse))
        np.testing.assert_allclose(
            np.asarray(out)[seen], np.asarray(want)[seen], atol=3e-6, err_msg=str(list(options))
        )
        np.testing.assert_allclose(np.asarray(lse)[seen], np.asarray(want_lse)[seen], atol=3e-6)
        assert (np.asarray(out)[~seen] == 0).all()


def test_unbatched_and_half_precision_calls(qkv):
    one = tuple(x[0] for x in qkv)
    out, lse = dot_product_attention(*one, is_causal=True, return_residual=True)
    want, want_lse = jax.nn.dot_product_attention(*one, is_causal=True, return_residual=True)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)
    half = tuple(x.astype(jnp.bfloat16) for x in qkv)
    out, lse = dot_product_attention(*half, return_residual=True)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


def test_residual_is_differentiable_where_that_of_jax_nn_is_not(qkv):
    """The silent trap: o · sigmoid(lse − s) has the right value and, with jax.nn, the wrong d query."""
    sinks = jnp.array([0.5, -1.0, 0.0, 2.0, 1.0, -0.3])

    def post_hoc(attend, q):
        out, lse = attend(q, *qkv[1:], return_residual=True)
        return (out * jax.nn.sigmoid(lse - sinks)[..., None]).sum()

    def direct(q):
        return dot_product_attention(q, *qkv[1:], sinks=sinks).sum()

    want, slope = jax.value_and_grad(direct)(qkv[0])
    ours, ours_slope = jax.value_and_grad(lambda q: post_hoc(dot_product_attention, q))(qkv[0])
    theirs, theirs_slope = jax.value_and_grad(lambda q: post_hoc(jax.nn.dot_product_attention, q))(
        qkv[0]
    )
    np.testing.assert_allclose([ours, theirs], [want, want], rtol=1e-5)
    np.testing.assert_allclose(ours_slope, slope, atol=1e-5)
    assert (
        jnp.abs(theirs_slope - slope).max() > 0.01
    )  # if this fails jax has mended it: drop the note


def test_sink_identities(qkv):
    """softmax1 = sink logit 0 = a slot of zero key and value; K-bias with zero value = token logit."""
    zero = dot_product_attention(*qkv, sinks=jnp.zeros(N))
    np.testing.assert_allclose(dot_product_attention(*qkv, normalizer="softmax1"), zero, atol=1e-6)
    q, k, v = qkv
    slot = [jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (k, v)]
    np.testing.assert_allclose(dot_product_attention(q, *slot), zero, atol=1e-6)
    key_bias = jnp.asarray(np.random.default_rng(3).normal(size=(K, H)), jnp.float32)
    biased_k = slot[0].at[:, -1].set(key_bias)
    per_token = jnp.einsum("BTKGH,KH->BTKG", q.reshape(B, T, K, N // K, H), key_bias) / np.sqrt(H)
    np.testing.assert_allclose(
        dot_product_attention(q, biased_k, slot[1]),
        dot_product_attention(*qkv, sinks=per_token.reshape(B, T, N)),
        atol=1e-6,
    )


def test_learned_sigmoid_bias_and_learned_scale_have_gradients(qkv):
    def loss(bias, scale):
        return dot_product_attention(
            *qkv, normalizer="sigmoid", normalizer_params={"bias": bias}, scale=scale
        ).sum()

    bias, scale = jnp.full(N, -2.0), jnp.asarray(0.4)
    same = dot_product_attention(*qkv, normalizer="sigmoid(bias=-2.0)", scale=0.4).sum()
    np.testing.assert_allclose(loss(bias, scale), same, rtol=1e-5)
    slopes = jax.grad(loss, argnums=(0, 1))(bias, scale)
    for argument, slope in enumerate(slopes):
        arguments = [bias, scale]
        nudge = 1e-2 * (jnp.arange(N) == 1 if argument == 0 else 1)
        up, down = list(arguments), list(arguments)
        up[argument] = arguments[argument] + nudge
        down[argument] = arguments[argument] - nudge
        numeric = (loss(*up) - loss(*down)) / 2e-2
        np.testing.assert_allclose(slope[1] if argument == 0 else slope, numeric, rtol=2e-2)


def test_sink_tokens_are_counted_within_segments():
    """Packed documents: each has its own sink tokens; the first of another document is none."""
    segments = jnp.array([5, 5, 5, 5, 2, 2, 2, 2, 2])
    q = k = jnp.zeros((1, 9, 1, 2))
    weights = attention_weights(
        q, k, is_causal=True, local_window_size=(1, 0), num_sink_tokens=1,
        query_segment_ids=segments, key_segment_ids=segments,
    )  # fmt: skip
    visible = np.asarray(weights[0, 0] > 0)
    want = np.zeros((9, 9), bool)
    for t in range(9):
        start = 0 if t < 4 else 4
        want[t, [j for j in {start, t - 1, t} if start <= j <= t]] = True
    np.testing.assert_array_equal(visible, want)


def test_key_is_sink_overrides_and_causality_still_holds():
    q = k = jnp.zeros((1, 6, 1, 2))
    flags = jnp.array([False, False, False, True, False, False])
    weights = attention_weights(
        q, k, is_causal=True, local_window_size=(0, 0), num_sink_tokens=2, key_is_sink=flags
    )
    want = np.eye(6, dtype=bool)
    want[3:, 3] = True  # seen by later queries only, and 0 and 1 are no sink tokens any more
    np.testing.assert_array_equal(np.asarray(weights[0, 0] > 0), want)


def test_window_of_w_keys_is_w_minus_one():
    q = k = jnp.zeros((1, 9, 1, 2))
    weights = attention_weights(q, k, is_causal=True, local_window_size=(4 - 1, 0))
    assert (np.asarray(weights[0, 0] > 0).sum(-1) == [1, 2, 3, 4, 4, 4, 4, 4, 4]).all()


def test_positions_near_int32_do_not_overflow():
    top = 2**31 - 1
    positions = jnp.arange(5, dtype=jnp.int32) + (top - 4)
    q = k = jnp.zeros((1, 5, 1, 2))
    near = attention_weights(
        q, k, local_window_size=(1, 1), query_positions=positions, key_positions=positions
    )
    np.testing.assert_allclose(near, attention_weights(q, k, local_window_size=(1, 1)))


def test_attention_weights_and_statistics_agree_with_the_output(qkv):
    q, k, v = qkv
    options = {"is_causal": True, "sinks": jnp.linspace(-1, 1, N), "logits_soft_cap": 3.0}
    weights = attention_weights(q, k, **options)
    out, lse = dot_product_attention(*qkv, **options, return_residual=True)
    np.testing.assert_allclose(
        jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, N // K, axis=2)), out, atol=1e-6
    )
    for given in (None, lse):
        got = attention_statistics(q, k, **options, lse=given)
        np.testing.assert_allclose(got.key_mass, weights.sum(-2), atol=1e-5)
        np.testing.assert_allclose(got.row_mass + got.sink_mass, 1, atol=1e-5)
    one = attention_statistics(q[0], k[0], **options)
    np.testing.assert_allclose(one.key_mass, weights[0].sum(-2), atol=1e-5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sink'"):
        attention_statistics(q, k, sink=1)


def test_resolve_and_dispatch(qkv, monkeypatch):
    def check(**call):
        raise NotImplementedError("only on Tuesdays")

    refuses = Implementation(print, check)
    assert attention.resolve(*qkv, is_causal=True) == "xla"
    assert attention.resolve(*qkv, implementation="reference") == "reference"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv]
    assert attention.resolve(*shapes, sinks=jax.ShapeDtypeStruct((N,), jnp.float32)) == "xla"
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "xla", refuses)
    assert attention.resolve(*qkv) == "rows"
    assert attention.resolve(*qkv, implementation=["xla", "reference"]) == "reference"
    with pytest.raises(NotImplementedError, match="only on Tuesdays"):
        dot_product_attention(*qkv, implementation="xla")
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "rows", refuses)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "reference", refuses)
    with pytest.raises(ExceptionGroup) as error:
        dot_product_attention(*qkv)
    assert [str(e) for e in error.value.exceptions] == [
        "xla: only on Tuesdays",
        "rows: only on Tuesdays",
        "reference: only on Tuesdays",
    ]


BY = {
    "xla": ("softmax", "sigsoftmax", "cog", "sigmoid", "relu", "elu", "identity", "consmax",
            "softpick", "rectified_only", "relu_softmax"),
    "rows": ("sigmoid(normalized=True)", "relu(by_length=True)", "elu(normalized=True)",
             "identity(normalized=True)", "scaled_softpick", "ssmax", "clipped_softmax",
             "normalized_clipped_softmax", "elastic_softmax", "sparsemax", "entmax15", "entmax",
             "stick_breaking"),
}  # fmt: skip


def test_resolve_names_who_serves_each_normalizer(qkv):
    for implementation, names in BY.items():
        for name in names:
            params = {
                leaf: jax.ShapeDtypeStruct((N,), jnp.float32)
                for leaf in normalizers.resolve(name).parameters
            }
            got = attention.resolve(*qkv, is_causal=True, normalizer=name, normalizer_params=params)
            assert got == implementation, name
    with pytest.raises(NotImplementedError, match="entmax15: its threshold depends on the whole"):
        dot_product_attention(*qkv, normalizer="entmax15", implementation="xla")


@pytest.mark.parametrize(
    "name", ["elastic_softmax", "consmax", "elu", "elu(normalized=True)", "stick_breaking"]
)
def test_weights_statistics_and_decode_agree_with_the_output(qkv, name):
    """One meaning of a normaliser, its leaves and its feature map, in all four functions."""
    q, k, v = qkv[0], qkv[1][:, :T], qkv[2][:, :T]
    leaves = normalizers.resolve(name).parameters
    options = {
        "normalizer": name,
        "normalizer_params": {leaf: jnp.linspace(-0.2, 0.5, N) for leaf in leaves},
    }
    out = dot_product_attention(q, k, v, is_causal=True, **options)
    weights = attention_weights(q, k, is_causal=True, **options)
    np.testing.assert_allclose(
        jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, N // K, axis=2)), out, atol=2e-6
    )
    got = attention_statistics(q, k, is_causal=True, **options)
    np.testing.assert_allclose(got.row_mass, weights.sum(-1), atol=1e-5)
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    decoded = decode_attention(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), query_positions=places, key_positions=places,
        **options,
    )  # fmt: skip
    np.testing.assert_allclose(decoded, out, atol=2e-6)
    one = dot_product_attention(q[0], k[0], v[0], is_causal=True, **options)
    np.testing.assert_allclose(one, out[0], atol=2e-6)


def test_elu_is_a_kernel_of_mapped_queries_and_keys(qkv):
    q, k = (np.where(np.asarray(x) > 0, np.asarray(x) + 1, np.exp(x)) for x in qkv[:2])
    want = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2)) / np.sqrt(H)
    got = attention_weights(*qkv[:2], normalizer="elu")
    np.testing.assert_allclose(got, want, rtol=2e-5)
    got = attention_weights(*qkv[:2], normalizer="elu(normalized=True)")
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), rtol=2e-5)
    scaled = attention_weights(*qkv[:2], normalizer="elu", scale=jnp.asarray(0.25))
    np.testing.assert_allclose(scaled, want * np.sqrt(H) / 4, rtol=2e-5)


def test_learned_leaves_have_gradients_in_every_implementation(qkv):
    def loss(leaves, name, implementation):
        return dot_product_attention(
            *qkv, is_causal=True, normalizer=name, normalizer_params=leaves,
            implementation=implementation,
        ).sum()  # fmt: skip

    for name in ("consmax", "ssmax"):
        leaves = {leaf: jnp.linspace(-0.2, 0.3, N) for leaf in normalizers.resolve(name).parameters}
        want = jax.grad(loss)(leaves, name, "reference")
        got = jax.grad(loss)(leaves, name, None)
        for leaf in leaves:
            assert np.abs(want[leaf]).min() > 1e-6, leaf
            np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-4, atol=1e-6)


def test_a_slow_fallback_is_logged_once(qkv, monkeypatch, caplog):
    monkeypatch.setattr(attention, "DENSE_WARNING_ELEMENTS", 10)
    monkeypatch.setattr(attention._dense, "told", False)
    with caplog.at_level(logging.WARNING, logger="sinkjax"):
        for _ in range(2):
            dot_product_attention(*qkv, implementation="reference")
    assert caplog.text.count("dense reference makes 924 logits") == 1


BAD = [
    (dict(sinks=jnp.zeros(K)), "sinks: expected [N=6] or [2, 7, 6], got (3,)"),
    (dict(sinks=jnp.zeros(N), normalizer="softmax1"), "only softmax takes sink logits"),
    (dict(normalizer="softmax2"), "normalizer: expected one of softmax,"),
    (dict(normalizer="sigmoid", return_residual=True), "has no log-sum-exp"),
    (dict(normalizer="softpick", return_residual=True), "has no log-sum-exp"),
    (dict(normalizer_params={"bias": jnp.zeros(N)}), "softmax takes [], got ['bias']"),
    (dict(normalizer="sigmoid", normalizer_params={"bias": jnp.zeros(K)}), "expected [N=6], got (3,)"),
    (dict(normalizer="stick_breaking"), "is_causal: expected True with normalizer stick_breaking"),
    (dict(normalizer="ssmax", normalizer_params={"bias": jnp.zeros(N)}), "takes ['scale'], got ['bias']"),
    (dict(mask=jnp.ones((T, S))), "mask: expected booleans, got float32"),
    (dict(mask=jnp.ones((S, T), bool)), "mask: expected a shape broadcastable to (2, 6, 7, 11)"),
    (dict(bias=jnp.ones((3, 1, T, S))), "bias: expected a shape broadcastable to (2, 6, 7, 11)"),
    (dict(local_window_size=(-1, 0)), "local_window_size: expected numbers of at least 0, got (-1, 0)"),
    (dict(num_sink_tokens=-1), "num_sink_tokens: expected at least 0, got -1"),
    (dict(query_segment_ids=jnp.zeros(T, int)), "expected both or neither"),
    (dict(query_positions=jnp.zeros(S, int)), "query_positions: expected [7] or [2, 7], got [11]"),
    (dict(key_positions=jnp.zeros((B, N, S), int)), "key_positions: expected [2, 3, 11], got [2, 6, 11]"),
    (dict(key_value_seq_lengths=jnp.array([3])), "key_value_seq_lengths: expected 2 integers"),
    (dict(logits_soft_cap=0.0), "logits_soft_cap: expected a number above 0, got 0.0"),
    (dict(implementation="cuda"), "'xla', 'rows', 'reference'], or several, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options(qkv, options, message):
    # `_check` has no annotations: the shape checks of the tests would come before its own.
    dispatched = {"return_residual", "implementation"} & set(options)
    with pytest.raises(ValueError) as error:
        (dot_product_attention if dispatched else attention._check)(*qkv, **options)
    assert message in str(error.value)


def test_bad_shapes_and_unknown_keywords(qkv):
    q, k, v = qkv
    for args, message in [
        ((q[0], k, v), "all three alike"),
        ((q, k[..., :2], v), "key: expected [B=2, S, K, H=5] with K dividing N=6"),
        ((q, k, v[:, 1:]), "value: expected [B=2, S=11, K=3, h]"),
        ((q, k.astype(jnp.bfloat16), v), "expected one dtype"),
        ((q.astype(int), k, v), "query: expected a floating-point array"),
    ]:
        with pytest.raises((ValueError, TypeError)) as error:
            # Below the annotations, which the tests check first.
            attention._check(*args)
        assert message in str(error.value)
    with pytest.raises(TypeError, match="sink_logits"):
        dot_product_attention(q, k, v, sink_logits=jnp.zeros(N))


def test_it_is_the_public_function():
    assert sinkjax.dot_product_attention is dot_product_attention
