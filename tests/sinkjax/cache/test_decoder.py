"""A whole decoder streamed through a cache is the dense decoder, in numpy float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full, SinkWindow
from sinkjax.models import DecoderConfig, from_parameters, parameters
from sinkjax.models.parameters import abstract
from sinkjax.modules.variant import DType

P, W = 3, 11
C = P + W
TEXT = 61
CUTS = {"1": (1,), "7": (7,), "W-1": (W - 1,), "W": (W,), "W+1": (W + 1,), ">C": (C + 6,)}
BASE = dict(
    vocab_size=19,
    model_dim=10,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=14,
    context_length=32,
)
# Variant -> its config, what the oracle calls its normaliser, and the mask of the two layers under a
# SinkWindow(P, W): a layer keeps a window of its own that fits, and takes the cache's otherwise.
ALL, OWN = (W, P), (5, 2)
VARIANTS = {
    "softmax": ({}, ("softmax", None), (ALL, ALL)),
    "softmax1": (
        {"normalizer": "softmax1", "windows": (5, None), "num_sink_tokens": 2},
        ("softmax1", None),
        (OWN, ALL),
    ),
    "softmax_n": (
        {"normalizer": "softmax_n(n=2.5)", "gate": "elementwise", "logits_soft_cap": 3.0},
        ("softmax_n", 2.5),
        (ALL, ALL),
    ),
    "sink logits": (
        {"sinks": True, "qk_norm": True, "windows": (None, W + 9)},
        ("softmax", None),
        (ALL, ALL),
    ),
    "sigmoid": (
        {"normalizer": "sigmoid(bias=-2.0)", "gate": "headwise", "tied_head": True},
        ("sigmoid", -2.0),
        (ALL, ALL),
    ),
    "softpick": (
        {"normalizer": "softpick", "windows": (None, 5), "scan_layers": True, "scale": 0.7},
        ("softpick", None),
        (ALL, (5, 0)),
    ),
}


def build(name, dtype: DType = "float32"):
    """The model with random parameters, every one of them different from its start."""
    config = DecoderConfig(**BASE, **VARIANTS[name][0], dtype=dtype, param_dtype=dtype)
    draw = np.random.default_rng(7).standard_normal

    def leaf(path, want):
        last = jax.tree_util.keystr(path)
        value = draw(want.shape) * (1.0 if "embedding" in last else 0.35)
        value = 1 + value if "scale" in last else value
        return jnp.asarray(value * (4 if "sinks" in last else 1), want.dtype)

    params = jax.tree_util.tree_map_with_path(leaf, parameters(abstract(config)))
    return from_parameters(config, params)


def dense(oracle, model, tokens, masks, cap, kind):
    """Logits [T, V] of the whole text at once, without a line of the library."""
    config = model.config
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(model))

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = weights["embedding"]["embedding"][tokens]
    for index, (window, sinks) in enumerate(masks):
        if config.scan_layers:
            stacked = weights["blocks"][index % len(config.windows)]
            block = jax.tree.map(lambda leaf, i=index: leaf[i // len(config.windows)], stacked)
        else:
            block = weights["blocks"][index]
        a, m = block["attention"], block["mlp"]
        h = norm(x, block["attention_norm"]["scale"])
        q, k, v = (np.einsum("td,dnh->tnh", h, a[n]["kernel"]) for n in ("query", "key", "value"))
        if config.qk_norm:
            q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
        out = oracle.attention(
            q,
            k,
            v,
            window=window,
            num_sink_tokens=sinks,
            position_cap=cap,
            normalizer=kind[0],
            parameter=kind[1],
            sinks=a.get("sinks"),
            scale=config.scale,
            logits_soft_cap=config.logits_soft_cap,
        )
        if config.gate == "headwise":
            out = out * sigmoid(h @ a["gate"]["kernel"])[..., None]
        elif config.gate == "elementwise":
            out = out * sigmoid(np.einsum("td,dnh->tnh", h, a["gate"]["kernel"]))
        x = x + np.einsum("tnh,nhd->td", out, a["out"]["kernel"])
        h = norm(x, block["mlp_norm"]["scale"])
        gate, up = h @ m["gate"]["kernel"], h @ m["up"]["kernel"]
        x = x + (gate * sigmoid(gate) * up) @ m["down"]["kernel"]
    x = norm(x, weights["final_norm"]["scale"])
    return x @ (
        weights["embedding"]["embedding"].T if config.tied_head else weights["head"]["kernel"]
    )


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def step(graph, params, tokens, positions, cache):
    output = nnx.merge(graph, params)(tokens, positions=positions, cache=cache)
    return output.logits, output.cache


def stream(model, cache, tokens, sizes):
    graph, params = nnx.split(model)
    outputs, start = [], 0
    for size in itertools.cycle(sizes):
        part = np.zeros((1, size), np.int32)
        have = tokens[start : start + size]
        part[0, : len(have)] = have
        positions = np.where(np.arange(size) < len(have), start + np.arange(size), -1)
        logits, cache = step(graph, params, part, positions.astype(np.int32)[None], cache)
        outputs.append(np.asarray(logits)[0, : len(have)])
        start += len(have)
        if start == len(tokens):
            return np.concatenate(outputs)
    raise AssertionError("no sizes")


def close(got, want, tolerance):
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


TOKENS = np.random.default_rng(1).integers(0, BASE["vocab_size"], TEXT)
MODES = ("cache_relative", "absolute")
FLOAT64 = [
    (name, mode, list(CUTS)[(i + 2 * j + 1) % len(CUTS)])
    for i, name in enumerate(VARIANTS)
    for j, mode in enumerate(MODES)
]
FLOAT32 = [(name, MODES[i % 2], list(CUTS)[(i + 3) % len(CUTS)]) for i, name in enumerate(VARIANTS)]


@pytest.mark.parametrize(("name", "mode", "cut"), FLOAT64)
def test_float64(x64, oracle, name, mode, cut):
    check(oracle, build(name, "float64"), name, mode, CUTS[cut], 1e-10)


@pytest.mark.parametrize(("name", "mode", "cut"), FLOAT32)
def test_float32(oracle, name, mode, cut):
    check(oracle, build(name), name, mode, CUTS[cut], 1e-5)


def check(oracle, model, name, mode, sizes, tolerance):
    _, kind, masks = VARIANTS[name]
    cap = C - 1 if mode == "cache_relative" else None
    got = stream(model, model.init_cache(SinkWindow(P, W, mode), 1), TOKENS, sizes)
    close(got, dense(oracle, model, TOKENS, masks, cap, kind), tolerance)


def test_a_full_cache_is_the_model_without_one(oracle):
    """And both are the oracle, so that the oracle's decoder is the library's."""
    model = build("softmax1")
    tokens = TOKENS[: BASE["context_length"]]
    masks = (OWN, (None, 0))
    want = dense(oracle, model, tokens, masks, None, VARIANTS["softmax1"][1])
    close(stream(model, model.init_cache(Full(len(tokens)), 1), tokens, (7,)), want, 1e-5)
    graph, params = nnx.split(model)
    alone = jax.jit(lambda p, x: nnx.merge(graph, p)(x).logits)(params, tokens[None])
    close(np.asarray(alone)[0], want, 1e-5)


def test_rows_of_different_age(oracle):
    """Rows that begin at different times, with padding anywhere, and one that begins anew."""
    model = build("sink logits")
    _, kind, masks = VARIANTS["sink logits"]
    graph, params = nnx.split(model)
    rows, size, starts = 3, 8, (0, 1, 5)
    draw = np.random.default_rng(3)
    texts = draw.integers(0, BASE["vocab_size"], (rows, TEXT))
    cache = model.init_cache(SinkWindow(P, W), rows)
    got: list[list[np.ndarray]] = [[] for _ in range(rows)]
    for turn in range(13):
        if turn == 4:  # row 1 is evicted and another text takes its place
            cache = cache.reset_rows(jnp.arange(rows) == 1)
            got[1], texts[1] = [], texts[1][::-1]
        tokens, positions = np.zeros((rows, size), np.int32), np.full((rows, size), -1, np.int32)
        for row in range(rows):
            count = draw.integers(0, size + 1) if turn >= starts[row] else 0
            count = min(count, TEXT - len(got[row]))
            columns = np.sort(draw.choice(size, count, replace=False))
            positions[row, columns] = len(got[row]) + np.arange(count)
            tokens[row, columns] = texts[row, positions[row, columns]]
        logits, cache = step(graph, params, tokens, positions, cache)
        for row in range(rows):
            got[row].extend(np.asarray(logits)[row][positions[row] >= 0])
    lengths = [len(x) for x in got]
    assert cache.time.tolist() == lengths and min(lengths) > C + W and len(set(lengths)) == rows
    for row, length in enumerate(lengths):
        want = dense(oracle, model, texts[row, :length], masks, C - 1, kind)
        close(np.stack(got[row]), want, 1e-5)
