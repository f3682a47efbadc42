"""Sparse prefill against float64 NumPy: what each pattern chooses, and attention on just that."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sinkjax.ops import dot_product_attention, sparse

B, T, S, N, K, H, V = 2, 27, 59, 6, 2, 5, 7
G, b = N // K, 4
Q, J = -(-T // b), -(-S // b)
START, PADDED = (32, 21), (0, 5)  # per row: first position, queries of padding at the end
SINKS = np.linspace(-2.0, 2.0, N)
CAP = 3.0

PATTERNS = {
    "a_shape": sparse.AShape(num_sink_tokens=5, window=10, block_size=b),
    "tri_shape": sparse.TriShape(5, 10, num_dense_queries=6, block_size=b),
    "vertical_slash": sparse.VerticalSlash(7, 5, 6, 3, 2, num_blocks=J, block_size=b),
    "block_sparse": sparse.BlockSparse(num_blocks=6, block_size=b),
    "flex_prefill": sparse.FlexPrefill(gamma=0.7, tau=0.1, num_blocks=J, block_size=b),
    "x_attention": sparse.XAttention(threshold=0.6, stride=2, num_blocks=J, block_size=b),
    "everything": sparse.BlockSparse(num_blocks=J + 3, block_size=b),
}


@functools.cache
def scene(seed=3):
    """Rows of different age whose chunk does not begin at a block, the second with padding."""
    draw = np.random.default_rng(seed).standard_normal
    query, key = draw((B, T, N, H)) * 1.5, draw((B, K, S, H))
    value = draw((B, K, S, V))
    mean = query.mean(1).reshape(B, K, G, H).mean(2)
    key[:, 0, :3] += 4 * mean[:, :1]
    key[:, 1, :b] = -9 * mean[:, 1:]  # where no pattern would look by itself
    positions = np.arange(T) + np.array(START)[:, None]
    positions = np.where(np.arange(T) < T - np.array(PADDED)[:, None], positions, -1)
    slots = np.where(np.arange(S) <= positions.max(1, keepdims=True), np.arange(S), -1)
    slots[0, 17] = -1  # a hole
    query[0, :, 1] = query[0, -1:, 1]  # a head whose means tell all
    return query, key, value, positions.astype(np.int32), slots.astype(np.int32)


@jax.jit
def attend(query, key, value, chosen, where, sinks):
    out, lse = sparse.sparse_attention(
        query, key, value, chosen, sinks=sinks, return_residual=True, logits_soft_cap=CAP, **where
    )
    if chosen.num_dense_queries > 0:  # its recall in the slow suite
        return out, lse, None
    return out, lse, sparse.recall(query, key, chosen, logits_soft_cap=CAP, **where)


@functools.cache
def result(name):
    """Selection, output, log-sum-exp and recall; with empty blocks and columns so that few programs
    serve all patterns."""
    query, key, value, positions, slots = floats(scene())
    where = {"query_positions": positions, "key_positions": slots}
    chosen = jax.jit(functools.partial(sparse.select, PATTERNS[name], logits_soft_cap=CAP))(
        query, key, **where
    )
    padded = chosen
    if chosen.window is None:
        more, columns = J - chosen.blocks.shape[-1], chosen.columns
        columns = np.full((B, N, 7), -1, np.int32) if columns is None else columns
        blocks = np.pad(chosen.blocks, [(0, 0)] * 3 + [(0, more)], constant_values=-1)
        padded = dataclasses.replace(chosen, blocks=blocks, columns=columns)
    attended = attend(query, key, value, padded, where, SINKS.astype(np.float32))
    return jax.tree.map(np.asarray, (chosen, *attended))


def floats(arrays):
    return [jnp.asarray(x.astype(np.float32) if x.dtype == np.float64 else x) for x in arrays]


# --- the oracle


class Row:
    """One row and head of the scene in float64."""

    def __init__(self, row, head):
        query, key, value, positions, slots = scene()
        self.q, self.k, self.v = query[row, :, head], key[row, head // G], value[row, head // G]
        self.positions, self.exists = positions[row], slots[row] >= 0
        self.sink = SINKS[head]
        x = CAP * np.tanh(self.q @ self.k.T / math.sqrt(H) / CAP)
        self.sees = self.exists & (np.arange(S) <= self.positions[:, None])
        self.logits = np.where(self.sees, x, -np.inf)
        self.valid = np.flatnonzero(self.positions >= 0)

    def softmax(self, rows):
        terms = np.exp(self.logits[rows])
        return terms / terms.sum(1, keepdims=True)

    def queries(self, i):
        return [t for t in range(i * b, min(T, i * b + b)) if self.positions[t] >= 0]

    def reach(self, i):
        """Blocks of which some query of block i sees a key."""
        return {s // b for t in self.queries(i) for s in range(S) if self.sees[t, s]}

    def forced(self, i):
        return ({0} | {p // b for p in self.positions[self.queries(i)]}) & self.reach(i)

    def pooled(self, queries):
        """Capped logits of a mean query with all mean keys, NaN where there is none."""
        newest = self.positions.max()
        means = np.full(J, np.nan)
        for j in range(J):
            slots = [s for s in range(j * b, min(S, j * b + b)) if self.exists[s] and s <= newest]
            if slots:
                x = self.q[queries].mean(0) @ self.k[slots].mean(0) / math.sqrt(H)
                means[j] = CAP * np.tanh(x / CAP)
        return means

    def last(self, count):
        """Sums over the last queries of the softmax per key and per distance."""
        rows = self.valid[-count:]
        p = self.softmax(rows)
        columns, diagonals = p.sum(0), np.zeros(S)
        for t, weights in zip(rows, p, strict=True):
            for s in range(self.positions[t] + 1):
                diagonals[self.positions[t] - s] += weights[s]
        return columns, diagonals, len(rows)

    def attention(self, mask):
        x = np.where(mask & self.sees, self.logits, -np.inf)
        total = np.exp(x).sum(1) + np.exp(self.sink)
        return np.exp(x) @ self.v / total[:, None], np.log(total)


def cover(mass, share, first):
    """Indices, the first ones first, then by mass until the share is reached."""
    kept, total = set(first), sum(mass[i] for i in first)
    for i in sorted(set(mass) - kept, key=lambda i: -mass[i]):
        if total >= share * sum(mass.values()):
            return kept
        kept.add(i)
        total += mass[i]
    return kept


def per_block(x):
    return {j: x[j * b : j * b + b].sum() for j in range(J)}


def a_shape(row, _pattern):
    p = row.positions[:, None]
    near = (p - np.arange(S) < 10) | (np.arange(S) < 5)
    return [
        {s // b for t in row.queries(i) for s in range(S) if near[t, s]} for i in range(Q)
    ], near


def vertical_slash(row, pattern):
    columns, diagonals, _ = row.last(pattern.num_queries)
    newest = row.positions.max()
    columns = np.where(row.exists & (np.arange(S) <= newest), columns, -np.inf)
    columns[: pattern.forced_columns] = np.inf
    diagonals = np.where(np.arange(S) <= newest, diagonals, -np.inf)
    diagonals[: pattern.forced_diagonals] = np.inf
    keys = set(np.argsort(-columns)[: pattern.num_columns])
    distances = np.argsort(-diagonals)[: pattern.num_diagonals]
    blocks = [
        {(row.positions[t] - d) // b for t in row.queries(i) for d in distances} for i in range(Q)
    ]
    return [{j for j in chosen if j >= 0} for chosen in blocks], keys


def block_sparse(row, pattern):
    chosen = []
    for i in range(Q):
        scores = row.pooled(row.queries(i)) if row.queries(i) else np.zeros(J)
        rest = sorted(row.reach(i) - row.forced(i), key=lambda j: -scores[j])
        chosen.append(row.forced(i) | set(rest[: pattern.num_blocks - len(row.forced(i))]))
    return chosen, None


def softmax_over(scores, blocks):
    terms = {j: math.exp(scores[j]) for j in blocks}
    return {j: x / sum(terms.values()) for j, x in terms.items()}


def divergence(row):
    """Root of the Jensen-Shannon divergence between guess and truth for the last queries."""
    columns, _, count = row.last(b)
    true = np.array([*per_block(columns).values()]) / count
    there = {j for i in range(Q) for j in row.reach(i)}
    guess = softmax_over(row.pooled(row.valid[-b:]), there)
    guess = np.array([guess.get(j, 0.0) for j in range(J)])
    terms = [x[x > 0] * np.log(x[x > 0] / ((true + guess) / 2)[x > 0]) for x in (true, guess)]
    return math.sqrt(sum(x.sum() for x in terms) / 2)


def flex_prefill(row, pattern):
    if divergence(row) < pattern.tau:
        mass, first = {}, []
        for i in range(Q):
            if row.queries(i):
                rows = softmax_over(row.pooled(row.queries(i)), row.reach(i))
                mass |= {(i, j): p for j, p in rows.items()}
                first += [(i, j) for j in row.forced(i)]
        kept = cover(mass, pattern.gamma, first)
        return [{j for i_, j in kept if i_ == i} for i in range(Q)], None
    columns, diagonals, _ = row.last(b)
    columns = cover(per_block(columns), pattern.gamma, [0])
    diagonals = cover(per_block(diagonals), pattern.gamma, [0])
    chosen = []
    for i in range(Q):
        own = max(row.positions[row.queries(i)], default=-1) // b
        chosen.append((columns | {own - e for e in diagonals}) & row.reach(i))
    return chosen, None


def x_attention(row, pattern):
    s, chosen = pattern.stride, []
    for i in range(Q):
        mass = dict.fromkeys(range(J), 0.0)
        for start in range(i * b, i * b + b, s):
            group = [t for t in range(start, min(T, start + s)) if row.positions[t] >= 0]
            scores = {}
            for h in range(0, S, s):
                there = [x for x in range(h, min(S, h + s)) if row.exists[x]]
                if there and group and h <= row.positions[group].max():
                    pairs = [(t, h + s - 1 - (t - start)) for t in group]
                    x = sum(row.q[t] @ row.k[j] for t, j in pairs if j in there)
                    scores[h] = CAP * np.tanh(x / s / math.sqrt(H) / CAP)
            for h, p in softmax_over(scores, scores).items():
                mass[h // b] += p
        chosen.append(cover(mass, pattern.threshold, row.forced(i)) if row.queries(i) else set())
    return chosen, None


ORACLES = {
    "a_shape": a_shape,
    "tri_shape": a_shape,
    "vertical_slash": vertical_slash,
    "block_sparse": block_sparse,
    "flex_prefill": flex_prefill,
    "x_attention": x_attention,
    "everything": lambda row, _: ([row.reach(i) for i in range(Q)], None),
}


def expand(row, blocks, extra, dense=0):
    """The mask of the chosen pairs; extra: a set of columns, a mask within the blocks, or None."""
    mask = np.array([[s // b in blocks[t // b] for s in range(S)] for t in range(T)])
    if isinstance(extra, set):
        mask[:, list(extra)] = True
    elif extra is not None:
        mask &= extra
    if dense:
        mask[row.valid[-dense:]] = True
    return mask


@pytest.mark.parametrize(
    "name",
    [
        *("tri_shape", "vertical_slash", "block_sparse", "everything"),
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("a_shape", "flex_prefill", "x_attention")
        ),
    ],
)
def test_pattern_and_attention_on_it(name):
    """Chosen blocks, output, log-sum-exp and recall of every row and head."""
    chosen, out, lse, recall = result(name)
    pattern = PATTERNS[name]
    for row, head in np.ndindex(B, N):
        oracle = Row(row, head)
        blocks, extra = ORACLES[name](oracle, pattern)
        blocks = [(x | oracle.forced(i)) & oracle.reach(i) for i, x in enumerate(blocks)]
        got = [x[x >= 0].tolist() for x in chosen.blocks[row, head]]
        assert got == [sorted(x) for x in blocks]
        if isinstance(extra, set):
            columns = chosen.columns[row, head]
            assert set(columns[columns >= 0]) == extra
        dense = 6 if name == "tri_shape" else 0
        mask = expand(oracle, blocks, extra, dense)
        want, want_lse = oracle.attention(mask)
        np.testing.assert_allclose(out[row, :, head], want, atol=1e-5)
        np.testing.assert_allclose(lse[row, :, head], want_lse, atol=1e-5)
        if name == "tri_shape":
            continue
        p = oracle.softmax(oracle.valid)
        share = np.where(mask[oracle.valid], p, 0).sum(1).mean()
        np.testing.assert_allclose(recall[row, head], share, atol=1e-5)
    assert (chosen.truncated == 0).all()
    if name == "everything":
        np.testing.assert_allclose(recall, 1, atol=1e-6)
    elif name != "tri_shape":
        assert recall.min() < 0.999  # the scene is not too easy


@pytest.mark.slow
def test_recall_of_dense_queries():
    query, key, _, positions, slots = floats(scene())
    where = {"query_positions": positions, "key_positions": slots, "logits_soft_cap": CAP}
    chosen = jax.tree.map(jnp.asarray, result("tri_shape")[0])
    recall = sparse.recall(query, key, chosen, **where)
    for row, head in np.ndindex(B, N):
        oracle = Row(row, head)
        mask = expand(oracle, *a_shape(oracle, None), dense=6)[oracle.valid]
        share = np.where(mask, oracle.softmax(oracle.valid), 0).sum(1).mean()
        np.testing.assert_allclose(recall[row, head], share, atol=1e-5)


def test_flex_prefill_chooses_both_ways():
    """Otherwise one of the two would not be tested above."""
    roots = [divergence(Row(*at)) for at in np.ndindex(B, N)]
    assert min(roots) < PATTERNS["flex_prefill"].tau < max(roots)


@pytest.mark.parametrize(
    "name",
    [
        "block_sparse",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("vertical_slash", "flex_prefill", "x_attention")
        ),
    ],
)
def test_sink_and_diagonal_are_in_whatever_the_budget(name):
    """Three blocks have room for nothing else; what goes is counted."""
    pattern = dataclasses.replace(PATTERNS[name], num_blocks=3)
    query, key, _, positions, slots = floats(scene())
    choose = jax.jit(functools.partial(sparse.select, pattern, logits_soft_cap=CAP))
    chosen = choose(query, key, query_positions=positions, key_positions=slots)
    blocks, truncated = np.asarray(chosen.blocks), np.asarray(chosen.truncated)
    assert blocks.shape == (B, N, Q, 3)
    for row, head in np.ndindex(B, N):
        oracle, lost = Row(row, head), 0
        wanted, _ = ORACLES[name](oracle, pattern)
        for i in range(Q):
            assert oracle.forced(i) <= set(blocks[row, head, i])
            lost += max(0, len((wanted[i] | oracle.forced(i)) & oracle.reach(i)) - 3)
        assert truncated[row, head] == lost
    assert (truncated.max() == 0) == (name == "block_sparse")


@pytest.mark.parametrize(
    "normalizer",
    [pytest.param(x, marks=pytest.mark.slow) for x in ("elu", "sigmoid", "stick_breaking")],
)
def test_other_normalisers_and_a_bias(normalizer):
    """The library's own masked dense attention is the oracle: that has one of NumPy."""
    query, key, value, positions, slots = floats(scene())
    where = {"query_positions": positions, "key_positions": slots, "normalizer": normalizer}
    bias = jnp.asarray(np.random.default_rng(5).standard_normal((1, N, T, S)), jnp.float32)
    chosen = result("vertical_slash")[0]
    mask = np.zeros((B, N, T, S), bool)
    for row, head in np.ndindex(B, N):
        columns = chosen.columns[row, head]
        blocks = [set(x[x >= 0]) for x in chosen.blocks[row, head]]
        mask[row, head] = expand(None, blocks, set(columns[columns >= 0]))

    @jax.jit
    def both(query, key, value, chosen, bias, mask):
        got = sparse.sparse_attention(query, key, value, chosen, bias=bias, **where)
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        dense = functools.partial(dot_product_attention, is_causal=True, implementation="reference")
        return got, dense(query, keys, values, bias, mask, **where)

    got, want = both(query, key, value, chosen, bias, mask)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_grows_with_the_square_of_the_length():
    """Of the arrays inside attention and recall, none has room for all pairs."""
    length, block, budget = 4096, 64, 4
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
    pattern = sparse.AShape(64, 64, block)
    whole = jax.make_jaxpr(
        lambda q, k: (
            sparse.sparse_attention(q, k, k, sparse.select(pattern, q, k)),
            sparse.recall(q, k, sparse.select(pattern, q, k)),
        )
    )(x, kv)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in equation.outvars if hasattr(v, "aval"))
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(whole.jaxpr)) <= length * max(block * budget, 256) / 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse.BlockSparse(num_blocks=2), "BlockSparse.num_blocks: expected an integer"),
        (lambda: sparse.XAttention(stride=7), "XAttention.stride: expected a divisor"),
        (lambda: sparse.FlexPrefill(gamma=1.5), "FlexPrefill.gamma: expected a number from 0 to 1"),
        (lambda: sparse.AShape(num_sink_tokens=0), "AShape.num_sink_tokens"),
        (lambda: sparse.VerticalSlash(num_columns=29), "VerticalSlash.num_columns"),
    ],
)
def test_impossible_patterns_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_selection_of_another_prompt_is_refused():
    query, key = jnp.zeros((1, 9, N, H)), jnp.zeros((1, K, 9, H))
    chosen = jax.tree.map(jnp.asarray, result("block_sparse")[0])
    with pytest.raises(ValueError, match="selection: expected blocks for"):
        sparse.sparse_attention(query, key, key, chosen)
    with pytest.raises(ValueError, match="query_positions: needed"):
        sparse.select(PATTERNS["a_shape"], query, key[:, :, :5])
