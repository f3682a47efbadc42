"""Scores against loops in float64 over the tokens held, in the order of the text.

The oracles see neither slots nor empty slots: those of the evidence lie in any order, other tokens in
each head, with rubbish where nothing is held. kvpress itself is in tests/parity/test_kvpress.py.
"""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sinkjax.cache import policies
from sinkjax.ops.rope import Rope

B, K, G, S, H, V, w = 2, 3, 5, 23, 6, 4, 7
N = K * G
TIME = (41, 19)
GAMMA = 0.8
CAP = 2.5
SCALE = 0.6

POLICIES = {
    "streaming": policies.StreamingLLM(),
    "h2o": policies.H2O(),
    "observed": policies.ObservedAttention(),
    "forgetting": policies.ObservedAttention(GAMMA),
    "hardly_forgetting": policies.ObservedAttention(1 - 1e-6),
    "vatp": policies.VATP(),
    "tova": policies.TOVA(),
    "snapkv": policies.SnapKV(num_queries=w, kernel=3),
    "knorm": policies.Knorm(),
    "keydiff": policies.KeyDiff(),
    "expected": policies.ExpectedAttention(
        num_queries=w, num_future=11, num_sink_tokens=2, epsilon=0.03
    ),
    "expected_mean": policies.ExpectedAttention(
        num_queries=w,
        num_future=11,
        num_sink_tokens=2,
        use_covariance=False,
        use_value_norm=False,
    ),
    "lagkv": policies.LagKV(num_sink_tokens=2, lag=4),
    "lagkv_across": policies.LagKV(num_sink_tokens=2, lag=4, cross_chunks=True),
    "lagkv_short": policies.LagKV(num_sink_tokens=3, lag=13),
    "random": policies.Random(seed=5),
}


def make(aligned):
    """Evidence; `aligned`: all heads of a row hold the same tokens in the same slots."""
    rng = np.random.default_rng(7)
    positions = np.full((B, K, S), -1, np.int32)
    for b, t in enumerate(TIME):
        for k in range(K):
            held = min(t, S) - (2 * b if aligned else k)
            if not aligned or k == 0:
                texts = rng.permutation(t)[:held]
                texts[0] = t - 1  # the last token is there, once
                texts = np.unique(texts)
                slots = rng.permutation(S)[: len(texts)]
            positions[b, k, slots] = rng.permutation(texts) if not aligned else texts
    key = rng.normal(size=(B, K, S, H))
    value = rng.normal(size=(B, K, S, V))
    key[positions < 0] = 1e4
    value[positions < 0] = 1e4
    query_positions = np.stack([np.arange(t - w, t) for t in TIME]).astype(np.int32)
    query_positions[1, :2] = -1
    return policies.Evidence(
        key=jnp.asarray(key, jnp.float32),
        value=jnp.asarray(value, jnp.float32),
        positions=jnp.asarray(positions),
        time=jnp.asarray(TIME, jnp.int32),
        queries=jnp.asarray(rng.normal(size=(B, w, N, H)) * 2 + 0.5, jnp.float32),
        query_positions=jnp.asarray(query_positions),
        mass=jnp.asarray(rng.uniform(size=(B, K, S)), jnp.float32),
        scale=SCALE,
        rope=Rope(H, theta=100.0),
        logits_soft_cap=CAP,
    )


@pytest.fixture(scope="module")
def worlds():
    return {aligned: make(aligned) for aligned in (False, True)}


@pytest.fixture(scope="module")
def scored(worlds):
    @jax.jit
    def run(loose, aligned):
        out = {
            name: policy.scores(aligned if name == "tova" else loose)
            for name, policy in POLICIES.items()
        }
        last = dataclasses.replace(
            loose, queries=loose.queries[:, -3:], query_positions=loose.query_positions[:, -3:]
        )
        for own in (True, False):
            out[f"local_{own}"] = policies.local_mass(last, num_sink_tokens=3, window=6, own=own)
        return out

    return jax.tree.map(np.asarray, run(worlds[False], worlds[True]))


class Head:
    """Tokens of one key head in the order of the text, and the queries that count."""

    def __init__(self, evidence, b, k):
        at = np.asarray(evidence.positions)[b, k]
        self.slots = np.argsort(at)[(at < 0).sum() :]
        self.at = at[self.slots].astype(int)
        self.key, self.value, self.mass = (
            np.asarray(x)[b, k][self.slots].astype(np.float64)
            for x in (evidence.key, evidence.value, evidence.mass)
        )
        self.t, self.k = TIME[b], k
        rows = np.asarray(evidence.query_positions)[b]
        self.query_at = rows[rows >= 0]
        self.queries = np.asarray(evidence.queries, np.float64)[b, rows >= 0][
            :, k * G : (k + 1) * G
        ]

    def weights(self, count=None):
        """[queries, G, tokens]."""
        logits = np.einsum("qgh,sh->qgs", self.queries, self.key) * SCALE
        logits = CAP * np.tanh(logits / CAP)
        logits[np.broadcast_to(self.at > self.query_at[:, None, None], logits.shape)] = -np.inf
        weights = np.exp(logits)
        return (weights / weights.sum(-1, keepdims=True))[-count if count else None :]


def turn(position, theta=100.0):
    """The [H, H] matrix of a rotation."""
    R = np.zeros((H, H))
    for i in range(H // 2):
        angle = position * theta ** (-2 * i / H)
        j = i + H // 2
        R[i, i] = R[j, j] = np.cos(angle)
        R[i, j], R[j, i] = -np.sin(angle), np.sin(angle)
    return R


def expected_attention(head, future, sinks, covariance, norm, epsilon):
    behind = head.query_at >= sinks
    free = np.stack(
        [turn(-p) @ q for p, q in zip(head.query_at, head.queries.swapaxes(1, 2), strict=True)]
    )[behind]
    R = np.mean([turn(head.t + i) for i in range(future)], axis=0)
    ranked = head.at >= sinks
    key = head.key[ranked]
    total = 0
    for g in range(G):
        logits = SCALE * key @ R @ free[:, :, g].mean(0)
        if covariance:
            spread = R @ np.cov(free[:, :, g], rowvar=False, bias=True) @ R.T
            logits += SCALE**2 * np.einsum("sh,hi,si->s", key, spread, key) / 2
        total += np.exp(logits) / np.exp(logits).sum() / G
    if norm:
        total = (total + epsilon) * np.sqrt((head.value[ranked] ** 2).sum(-1))
    return np.concatenate([np.full((~ranked).sum(), np.inf), total])


def lagkv(head, sinks, lag, across):
    scores = [np.inf] * (head.at < sinks).sum()
    body = np.flatnonzero(head.at >= sinks)
    while len(body) >= 2 * lag:
        this, following, body = body[:lag], body[lag : 2 * lag], body[lag:]
        parts = []
        for x in (head.key, head.value):
            low, high = x[following].min(0), x[following].max(0)
            spread = np.std((x[this] - low) / (high - low), axis=1, ddof=1)
            parts.append(np.exp(spread) / np.exp(spread).sum())
        mean = (parts[0] + parts[1]) / 2
        scores += list(mean if across else [(mean < m).sum() / lag for m in mean])
    start, count = len(scores), len(head.at) - (head.at < sinks).sum()
    ranks = np.arange(len(head.at))[start:] - (head.at < sinks).sum() + 1
    return np.array(scores + list(1 + ranks / (count + 1)))


def lowbias32(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * factor) % 2**32
    return x ^ x >> 16


def oracle(name, head, heads):
    """Scores of a head's tokens, in the order of the text; `heads`: all of its row."""
    if name == "streaming":
        return head.at - head.t
    if name == "h2o":
        return head.mass
    if name == "observed":
        return head.mass / (head.t - head.at)
    if name.endswith("forgetting"):
        base = POLICIES[name].discount
        return head.mass / [sum(base**n for n in range(head.t - i)) for i in head.at]
    if name == "vatp":
        return head.mass * np.abs(head.value).sum(-1)
    if name == "tova":
        return np.mean([other.weights(1)[0] for other in heads], axis=(0, 1))
    if name == "snapkv":
        before = head.at < head.query_at[0]
        votes = np.pad(head.weights().mean((0, 1))[before], 1)
        means = (votes[:-2] + votes[1:-1] + votes[2:]) / 3
        return np.concatenate([means, np.full((~before).sum(), np.inf)])
    if name == "knorm":
        return -np.sqrt((head.key**2).sum(-1))
    if name == "keydiff":
        unit = head.key / np.linalg.norm(head.key, axis=-1, keepdims=True)
        mean = unit.mean(0)
        return -unit @ mean / np.linalg.norm(mean)
    if name == "expected":
        return expected_attention(head, 11, 2, True, True, 0.03)
    if name == "expected_mean":
        return expected_attention(head, 11, 2, False, False, 0)
    if name.startswith("lagkv"):
        sinks, lag = {"lagkv": (2, 4), "lagkv_across": (2, 4), "lagkv_short": (3, 13)}[name]
        return lagkv(head, sinks, lag, name == "lagkv_across")
    if name == "random":
        start = lowbias32(lowbias32((5 + 0x9E3779B9) % 2**32) ^ head.k)
        return np.array([lowbias32(start ^ int(i)) >> 8 for i in head.at]) / 2**24
    raise AssertionError(name)


@pytest.mark.parametrize("name", POLICIES)
def test_scores(name, scored, worlds):
    evidence = worlds[name == "tova"]
    assert scored[name].shape == (B, K, S) and scored[name].dtype == np.float32
    for b in range(B):
        heads = [Head(evidence, b, k) for k in range(K)]
        for k, head in enumerate(heads):
            expected = oracle(name, head, heads)
            got = scored[name][b, k, head.slots]
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_policies(name):
    policy = POLICIES[name]
    assert isinstance(policy, policies.Policy)
    assert hash(policy) == hash(dataclasses.replace(policy))


def test_vatp_loses_an_unprotected_sink():
    """Its value is small, which is what makes it a sink."""
    mass, value = np.ones((1, 1, S), np.float32), np.ones((1, 1, S, V), np.float32)
    mass[..., 0], value[:, :, 0] = 9.0, 1e-3
    positions, time = np.arange(S, dtype=np.int32)[None, None], np.array([S], np.int32)

    @jax.jit
    def kept(mass, value, positions, time):
        evidence = policies.Evidence(value, value, positions, time, mass=mass)
        with_value, without = policies.VATP().scores(evidence), policies.H2O().scores(evidence)
        scores = jnp.concatenate([with_value, with_value, without])
        sink = policies.protect(positions, time, num_sink_tokens=1)
        none = jnp.zeros_like(scores, bool)
        return policies.keep(scores, jnp.concatenate([none[:1], sink, none[:1]]), none, 6)

    first = kept(mass, value, positions, time)[:, 0, 0]
    assert first.tolist() == [S - 6, 0, 0]


def test_random_knows_only_position_head_and_seed(scored, worlds):
    positions = np.broadcast_to(np.arange(3 * S, dtype=np.int32), (1, 2, 3 * S))

    @jax.jit
    def run(late, line):
        line = dataclasses.replace(late, positions=line)
        return policies.Random(5).scores(late), [policies.Random(i).scores(line) for i in (5, 6)]

    late, draws = run(
        dataclasses.replace(worlds[False], time=np.array([170, 19], np.int32)), positions
    )
    np.testing.assert_array_equal(late, scored["random"])
    draws = np.ravel(draws)
    assert len(np.unique(draws)) == draws.size and 0 <= draws.min() and draws.max() < 1
    np.testing.assert_allclose(draws.mean(), 0.5, atol=0.06)


@pytest.mark.parametrize("own", [True, False])
def test_local_mass(own, scored, worlds):
    got = scored[f"local_{own}"]
    for b in range(B):
        shares = []
        for head in (Head(worlds[False], b, k) for k in range(K)):
            end = head.t if own else head.query_at[-3]
            local = ((head.at < 3) | (head.at >= end - 6)) & (head.at < end)
            shares.append(head.weights(3)[..., local].sum(-1))
        np.testing.assert_allclose(got[b], np.mean(shares), rtol=1e-5)


def test_lazy_layers():
    mass = np.array([[0.95, 0.9], [0.99, 0.7], [0.2, 0.3]], np.float32)
    lazy = jax.jit(policies.lazy_layers, static_argnums=1)
    assert lazy(mass, 0.9).tolist() == [True, False, False]
    assert lazy(mass[:, 0], 0.9).tolist() == [True, True, False]


def test_protect():
    positions = np.asarray([[[0, 1, 2, 7, 8, 9, -1]], [[3, 0, -1, 4, 1, -1, -1]]], np.int32)
    time = np.asarray([10, 5], np.int32)

    def safe(*args, **kwargs):
        mask = jax.jit(lambda *leaves: policies.protect(*leaves, *args, **kwargs))(positions, time)
        return np.asarray(mask).astype(int).tolist()

    assert safe(2, 1) == [[[1, 1, 0, 0, 0, 1, 0]], [[0, 1, 0, 1, 1, 0, 0]]]
    assert safe(0, 0) == [[[0] * 7], [[0] * 7]]
    pinned = jnp.asarray([[7, -1], [-1, 3]], jnp.int32)
    assert safe(0, 0, pinned) == [[[0, 0, 0, 1, 0, 0, 0]], [[1, 0, 0, 0, 0, 0, 0]]]
    for name in ("num_sink_tokens", "window"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
            safe(**{name: -1})


# ---- keep ----

SLOTS = 9
keep = jax.jit(policies.keep, static_argnums=3)
weakest = jax.jit(policies.weakest)
ODD = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, np.inf, -np.inf, np.nan])
flags = arrays.arrays(bool, (1, 2, SLOTS))


def standing(score, protect, empty, slot):
    score = 0 if protect else -np.inf if np.isnan(score) else score
    return (False, False, 0, slot) if empty else (True, protect, score, slot)


@hypothesis.settings(deadline=None, max_examples=80, derandomize=True)
@hypothesis.given(
    scores=arrays.arrays(np.float32, (1, 2, SLOTS), elements=ODD),
    protect=flags,
    empty=flags,
    budget=st.sampled_from([0, 4, 8, 9]),
)
def test_keep(scores, protect, empty, budget):
    slots = np.asarray(keep(scores, protect, empty, budget))
    for k in range(2):
        row = scores[0, k], protect[0, k], empty[0, k]
        best = sorted(range(SLOTS), key=lambda i: standing(*(x[i] for x in row), i))
        best = sorted(best[SLOTS - budget :], key=lambda i: (row[2][i], i))
        assert slots[0, k].tolist() == best
        safe = set(np.flatnonzero(row[1] & ~row[2]))
        assert safe <= set(best) or len(safe) > budget


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
    scores=arrays.arrays(np.float32, (1, 2, SLOTS), elements=ODD),
    protect=flags,
    empty=flags,
    order=st.permutations(range(SLOTS)),
)
def test_weakest_is_the_one_that_keep_leaves_out(scores, protect, empty, order):
    """Whatever the slots: between equals the earlier position goes."""
    order = np.array(order)
    positions = np.where(empty, -1, np.arange(SLOTS)).astype(np.int32)
    left = [
        set(range(SLOTS)) - set(row)
        for row in np.asarray(keep(scores, protect, empty, 8))[0].tolist()
    ]
    moved = [x[..., order] for x in (scores, protect, empty, positions)]
    for k, slot in enumerate(np.asarray(weakest(*moved))[0]):
        if empty[0, k].any():
            assert moved[2][0, k, slot]
        else:
            assert order[slot] in left[k]


def test_keep_in_float64(x64):
    scores = np.array([[[1.0, 1.0 + 1e-14, 1.0 - 1e-14, np.inf, np.nan]]])
    nothing = np.zeros(scores.shape, bool)
    assert keep(scores, nothing, nothing, 2).tolist() == [[[1, 3]]]


def test_ties_keep_what_is_protected():
    """Scores that are all the same, of which a maximum cannot lift any out (kvpress issue #227)."""
    scores = np.full((1, 2, SLOTS), np.inf, np.float32)
    safe = np.broadcast_to(np.isin(np.arange(SLOTS), [0, 1, 8]), scores.shape)
    empty = np.zeros(scores.shape, bool)
    assert keep(scores, safe, empty, 4).tolist() == [[[0, 1, 7, 8]] * 2]
    assert keep(scores, safe, empty, 8).tolist() == [[[0, 1, 3, 4, 5, 6, 7, 8]] * 2]


def test_bad_input_is_refused(worlds):
    bare = dataclasses.replace(worlds[False], queries=None, query_positions=None, mass=None)
    for name in ("h2o", "observed", "vatp"):
        with pytest.raises(ValueError, match="evidence: .* needs the attention mass, got None"):
            POLICIES[name].scores(bare)
    for name in ("tova", "snapkv", "expected"):
        with pytest.raises(ValueError, match="evidence: .* needs queries and query_positions"):
            POLICIES[name].scores(bare)
    with pytest.raises(ValueError, match="groups of 3 key heads, got 14"):
        wrong = dataclasses.replace(worlds[False], queries=np.zeros((B, w, 14, H), np.float32))
        POLICIES["snapkv"].scores(wrong)
    scores, zeros = np.zeros((1, 1, 3), np.float32), np.zeros((1, 1, 3), bool)
    for budget in (-1, 4):
        with pytest.raises(ValueError, match=f"budget: expected 0 to S = 3, got {budget}"):
            keep(scores, zeros, zeros, budget)
    for policy, field, bad in (
        (policies.H2O, "discount", 0.0),
        (policies.ObservedAttention, "discount", 1.5),
        (policies.VATP, "discount", -1.0),
        (policies.SnapKV, "num_queries", 0),
        (policies.SnapKV, "kernel", 4),
        (policies.ExpectedAttention, "num_queries", 0),
        (policies.ExpectedAttention, "num_future", 0),
        (policies.ExpectedAttention, "num_sink_tokens", -1),
        (policies.LagKV, "lag", 1),
        (policies.LagKV, "num_sink_tokens", -2),
    ):
        with pytest.raises(
            ValueError, match=rf"{policy.__name__}\.{field}: expected .*, got {bad}"
        ):
            policy(**{field: bad})
