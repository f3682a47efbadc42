"""Policies and budgets against kvpress: which tokens of a prompt stay, in every layer and head.

kvpress compresses the cache of a small random Llama of Hugging Face transformers. The archive holds
the queries, keys and values which that model computed and, for each press, the tokens that stayed.
From those arrays ours must keep exactly the same.

Every press sees the same arrays, as compression comes after a layer's attention. Layers stand where
our arrays have rows.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.cache import budgets, policies
from sinkjax.ops.rope import Rope

CASES = {"prompt": None}

# Weights large enough for heads that look at few tokens. Between what stays and what goes, scores
# differ by 1e-4 of their size at least, in every head: more than another order of sums can change.
SEED, GAIN = 44, 1.5
L, T, N, K, H = 3, 131, 8, 2, 6
SIZES = {
    "vocab_size": 139,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 1024,
}

# The part of a prompt that goes: 80 of 131 tokens stay. LagKV then keeps, beside 4 sinks and a tail
# of 34, the best 14 of each of 3 chunks; any other number would cut through equal ranks, which torch
# breaks as it likes.
RATIO = 1 - 80.5 / T

# kvpress forces what it must not lose by a score above all others; here that is protected.
# press, its arguments; our policy, sink tokens, window
SCORED = {
    "knorm": ("KnormPress", {}, policies.Knorm(), 0, 0),
    "keydiff": ("KeyDiffPress", {}, policies.KeyDiff(), 0, 0),
    "tova": ("TOVAPress", {}, policies.TOVA(), 0, 1),
    "streaming": ("StreamingLLMPress", {"n_sink": 4}, policies.StreamingLLM(), 4, 0),
    "observed": ("ObservedAttentionPress", {}, policies.ObservedAttention(), 0, 0),
    "snapkv": ("SnapKVPress", {}, policies.SnapKV(), 0, 64),
    "snapkv_small": (
        "SnapKVPress",
        {"window_size": 17, "kernel_size": 7},
        policies.SnapKV(num_queries=17, kernel=7),
        0,
        17,
    ),
    "expected": ("ExpectedAttentionPress", {}, policies.ExpectedAttention(T), 4, 0),
    "expected_mean": (
        "ExpectedAttentionPress",
        {"use_covariance": False, "use_vnorm": False, "n_sink": 3, "n_future_positions": 37},
        policies.ExpectedAttention(
            T, num_future=37, num_sink_tokens=3, use_covariance=False, use_value_norm=False
        ),
        3,
        0,
    ),
    "lagkv": ("LagKVPress", {"lag_size": 31}, policies.LagKV(lag=31), 4, 0),
    "lagkv_across": (
        "LagKVPress",
        {"lag_size": 17, "n_sink": 5, "cross_scoring": True},
        policies.LagKV(num_sink_tokens=5, lag=17, cross_chunks=True),
        5,
        0,
    ),
    "lagkv_short": ("LagKVPress", {}, policies.LagKV(), 4, 0),
}

# window, kernel and beta of both: with room on both sides, cut at the top, and given up
PYRAMIDS = {"pyramid": (17, 7, 1.5), "pyramid_cut": (17, 7, 20), "pyramid_flat": (64, 5, 20)}
ADA = (17, 7)  # window and kernel; the safeguard is the default of both
LAZY = (0.2, 23)  # threshold and window

NAMES = (*SCORED, *PYRAMIDS, "ada", "lazy")
# Other settings of what is there already, and seconds to compile: with the extra `parity` only.
VARIANTS = {"expected_mean", "lagkv_across", "pyramid_cut"}


def evidence(query, key, value):
    """Of a whole prompt; what each policy asks for is cut from the end."""
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (L, K, T))
    logits = np.einsum("LtKGH,LKsH->LKGts", query.reshape(L, T, K, -1, H), key) * H**-0.5
    weights = np.exp(logits) * np.tri(T)
    weights /= weights.sum(-1, keepdims=True)
    return policies.Evidence(
        jnp.asarray(key),
        jnp.asarray(value),
        jnp.asarray(positions),
        jnp.full((L,), T, jnp.int32),
        queries=jnp.asarray(query),
        query_positions=jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (L, T)),
        mass=jnp.asarray(weights.mean(2).sum(2), jnp.float32),
        rope=Rope(H),
    )


@functools.partial(jax.jit, static_argnums=1)
def ours(seen, names):
    """The tokens that stay, [L, K, T], under each name."""
    scores = {}

    def score(policy):
        if policy not in scores:
            w = policy.num_queries
            cut = dataclasses.replace(
                seen,
                queries=seen.queries[:, T - w :] if w else None,
                query_positions=seen.query_positions[:, T - w :] if w else None,
                mass=None if policy.discount is None else seen.mass,
            )
            scores[policy] = policy.scores(cut)
        return scores[policy]

    def chosen(slots):
        return (slots[..., None] == jnp.arange(T)).any(-2)

    plan = budgets.Uniform.of(T, RATIO)
    cases = {name: (plan, *ours) for name, (_, _, *ours) in SCORED.items()}
    for name, (window, kernel, beta) in PYRAMIDS.items():
        pyramid = budgets.Pyramid(T * (1 - RATIO), window, beta, length=T)
        cases[name] = (pyramid, policies.SnapKV(window, kernel), 0, window)
    # Layers of one budget together, only to compile less.
    groups = collections.defaultdict(dict)
    cases = {name: case for name, case in cases.items() if name in names}
    for name, (budget, policy, sinks, window) in cases.items():
        safe = policies.protect(seen.positions, seen.time, sinks, window)
        for i in range(L):
            groups[budget.layer(i, L)][name, i] = score(policy)[i], safe[i]
    rows = {}
    for size, members in groups.items():
        leaves = (jnp.stack(x) for x in zip(*members.values(), strict=True))
        slots = policies.keep(*leaves, jnp.zeros((len(members), K, T), bool), size)
        rows |= dict(zip(members, chosen(slots), strict=True))
    kept = {name: jnp.stack([rows[name, i] for i in range(L)]) for name in cases}

    window, kernel = ADA
    safe = policies.protect(seen.positions, seen.time, 0, window)
    empty = jnp.zeros((L, K, T), bool)
    shared = budgets.Ada().keep(score(policies.SnapKV(window, kernel)), safe, empty, plan.size)
    kept["ada"] = chosen(shared.slots)

    threshold, window = LAZY
    last = dataclasses.replace(
        seen, queries=seen.queries[:, -1:], query_positions=seen.query_positions[:, -1:]
    )
    lazy = policies.lazy_layers(policies.local_mass(last, window=window, own=False), threshold)
    local = policies.protect(seen.positions, seen.time, 4, window - 1)
    kept["lazy"] = jnp.where(lazy[:, None, None], local, True)
    return kept


def make():
    """The prompt, no token twice: in layer 0 both would have keys of one length, and tie."""
    return {"tokens": np.random.default_rng(29).permutation(SIZES["vocab_size"])[None, :T]}


def theirs(peer):
    """Queries, keys and values of the model, and the tokens that each press leaves."""
    torch, transformers, kvpress = (peer(name) for name in ("torch", "transformers", "kvpress"))
    llama = peer("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(**SIZES, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = rng.normal(size=tuple(parameter.shape))
            value = 1 + noise / 4 if "norm" in name else GAIN * noise * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.tensor(value))
    tokens = torch.tensor(make()["tokens"])
    queries = {}

    def position(module, args, kwargs):
        # What kvpress 0.5.5 tells a prompt by; transformers has stopped passing it on in 5.3.
        return args, kwargs | {"cache_position": torch.arange(kwargs["hidden_states"].shape[1])}

    def record(module, args, kwargs, output):
        query = module.q_proj(kwargs["hidden_states"]).view(1, T, N, H).transpose(1, 2)
        query, _ = llama.apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
        queries[module.layer_idx] = query[0].transpose(0, 1).numpy()

    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.register_forward_pre_hook(position, with_kwargs=True)
        layer.register_forward_hook(record, with_kwargs=True)

    def compress(press):
        cache = transformers.DynamicCache()
        with torch.no_grad(), press(model):
            model(tokens, past_key_values=cache)
        return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]

    whole = compress(kvpress.KnormPress(0.0))
    results = {
        "query": np.stack([queries[i] for i in range(L)]),
        "key": np.stack([key for key, _ in whole]),
        "value": np.stack([value for _, value in whole]),
    }

    def masks(press):
        kept = [
            (results["key"][i][:, :, None] == key[:, None]).all(-1).any(-1)
            for i, (key, _) in enumerate(compress(press))
        ]
        return np.stack(kept).astype(np.float32)

    for name, (press, options, *_) in SCORED.items():
        press = getattr(kvpress, press)(compression_ratio=RATIO, **options)
        results[f"kept/{name}"] = masks(press)
    for name, (window, kernel, beta) in PYRAMIDS.items():
        press = kvpress.PyramidKVPress(RATIO, window_size=window, kernel_size=kernel, beta=beta)
        results[f"kept/{name}"] = masks(press)
    threshold, window = LAZY
    press = kvpress.SimLayerKVPress(lazy_threshold=threshold, n_recent=window)
    results["kept/lazy"] = masks(press)

    config._attn_implementation = "sdpa"  # AdaKV only marks what is to be left out; not with eager
    window, kernel = ADA
    compress(kvpress.AdaKVPress(kvpress.SnapKVPress(RATIO, window, kernel)))
    ada = np.ones((L, K, T), np.float32)
    for i, layer in enumerate(layers):
        _, heads, slots = layer.masked_key_indices
        ada[i, heads.numpy(), slots.numpy()] = 0
    results["kept/ada"] = ada
    return results


def compare(results, names):
    arrays = {name: results[name] for name in ("query", "key", "value")}
    kept = jax.tree.map(np.asarray, ours(evidence(**arrays), names))
    assert set(kept) == set(names)
    for name in names:
        np.testing.assert_array_equal(kept[name], results[f"kept/{name}"] > 0, name)


def test_golden(golden):
    _, results = golden.read("prompt")
    assert set(results) == {"query", "key", "value", *(f"kept/{name}" for name in NAMES)}
    compare(results, tuple(name for name in NAMES if name not in VARIANTS))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of `fire`, which kvpress imports
def test_kvpress(golden, peer):
    results = theirs(peer)
    golden.settle("prompt", make(), results)
    compare(results, NAMES)
