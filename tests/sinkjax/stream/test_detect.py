"""Sinks found where they are, in a model whose weights say where that is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax import stream
from sinkjax.cache import Full, SinkWindow
from sinkjax.models import Decoder, DecoderConfig
from sinkjax.stream import detect

VOCAB, CONTEXT = 37, 64
FLAT, SPIKES, SLOW = 0, [1, 2], [3, 7]
"""Channels of the stream: the same in every token; an outlier per head's sink. Channels of a head that
hardly turn within a text."""
FOR_BOTH, FOR_FIRST, FOR_SECOND = VOCAB - 1, VOCAB - 2, VOCAB - 3
"""Token ids on which both heads, the first and the second rest."""
P, W = 4, 12
LENGTH = 56


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Random, but queries meet the keys of the special tokens only in the channels `SLOW`.

    Those tokens have massive activations, from the embedding to the end, and values of almost nothing: who
    looks at them keeps what it has. Who cannot looks at something else.
    """
    config = DecoderConfig(
        vocab_size=VOCAB, model_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=12, context_length=CONTEXT, init_std=0.4,
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))

    def table(x):
        x[:, FLAT], x[:, SPIKES] = 1, 0
        for token, heads in ((FOR_BOTH, SPIKES), (FOR_FIRST, SPIKES[:1]), (FOR_SECOND, SPIKES[1:])):
            x[token, heads] = 900

    def query(x):
        x[..., SLOW] = 0
        x[FLAT, [0, 1], SLOW] = 3

    def key(x):
        x[..., SLOW] = x[SPIKES] = 0
        x[SPIKES, 0, SLOW] = 1.4

    def value(x):
        x *= 2
        x[SPIKES] = 0

    def out(x):
        x[..., [FLAT, *SPIKES]] = 0

    def widen(x):
        x[SPIKES] = 0
        x[SPIKES, 0] = 9  # the down projection gets an outlier, and drops it

    def down(x):
        x[0] = x[:, [FLAT, *SPIKES]] = 0

    def edit(parameter, change):
        array = np.array(parameter[...])
        change(array)
        parameter[...] = jnp.asarray(array)

    edit(model.embedding.embedding, table)
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        for module, change in (
            (attention.query, query), (attention.key, key), (attention.value, value),
            (attention.out, out), (mlp.gate, widen), (mlp.up, widen), (mlp.down, down),
        ):  # fmt: skip
            edit(module.kernel, change)
    return model


def text(special: dict[int, int], length: int = LENGTH, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, FOR_SECOND, length)
    for position, token in special.items():
        tokens[position] = token
    return tokens[None].astype(np.int32)


ONE, TWO = {14: FOR_BOTH}, {0: FOR_FIRST, 14: FOR_SECOND}
LATE = {31: FOR_BOTH}
"""As in nothing known; as in Llama-2-7B; past the end of the cache."""


@functools.lru_cache
def programs(graph):
    @jax.jit
    def dense(parameters, tokens):
        return nnx.merge(graph, parameters)(tokens).logits

    @jax.jit
    def step(parameters, cache, tokens):
        output = nnx.merge(graph, parameters)(tokens, cache=cache)
        return output.logits, output.cache

    return dense, step


def divergence(model, tokens, cache, start, chunk=8) -> float:
    """Mean KL(dense ‖ streamed) in nats of the tokens from `start` on, where the cache evicts."""
    graph, parameters = nnx.split(model)
    dense, step = programs(graph)
    outputs = []
    for begin in range(0, LENGTH, chunk):
        logits, cache = step(parameters, cache, tokens[:, begin : begin + chunk])
        outputs.append(logits)
    p, q = (
        np.asarray(jax.nn.log_softmax(x, axis=-1), np.float64)[0, start:]
        for x in (dense(parameters, tokens), np.concatenate(outputs, axis=1))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "method",
    [
        "attention",
        "channel",
        pytest.param("norm", marks=pytest.mark.slow),
        pytest.param("hidden", marks=pytest.mark.slow),
    ],
)
def test_sinks_are_found(model, method):
    rows = np.concatenate([text(ONE), text(TWO), text({}), text(LATE)])
    lengths = [LENGTH, 40, LENGTH, 9]  # the sink of the last row is beyond its end
    found = detect.detect_sinks(model, rows, lengths=lengths, method=method, max_sink_tokens=3)
    assert found.dtype == np.int32
    assert found.tolist() == [[14, -1, -1], [0, 14, -1], [-1] * 3, [-1] * 3]
    best = detect.detect_sinks(model, rows, method=method, max_sink_tokens=1)
    assert best.tolist() in ([[14], [0], [-1], [31]], [[14], [14], [-1], [31]])
    assert (detect.detect_sinks(model, rows, method=method, threshold=1e9) == -1).all()


@pytest.mark.parametrize("method", ["attention", pytest.param("norm", marks=pytest.mark.slow)])
def test_sinks_beyond_the_context(model, method):
    """Pieces are led by the sinks found so far, so that their own first tokens do not look like some."""
    tokens = text({14: FOR_FIRST, 100: FOR_SECOND, 139: FOR_SECOND}, length=150)
    found = detect.detect_sinks(model, tokens, method=method)
    assert found[0, :2].tolist() == [14, 100]
    assert set(found[0, 2:].tolist()) <= {139, -1}


@pytest.mark.parametrize("special", [ONE, TWO, LATE], ids=["14", "0 and 14", "31"])
def test_found_sinks_keep_the_model_what_it_is(model, special):
    tokens = text(special)
    start = max(special) + W + 2
    auto = detect.pinned(model, model.init_cache(SinkWindow("auto", W), 1), tokens)
    pins = auto.sink_positions[0].tolist()
    assert set(special) <= set(pins) and set(pins) - set(special) <= set(range(P))
    first = divergence(model, tokens, model.init_cache(SinkWindow(P, W), 1), start)
    found = divergence(model, tokens, auto, start)
    assert first > 1.0 and found < 0.25 and found < first / 8


def test_generate_pins_what_it_finds(model, tmp_path):
    """And the session remembers, also in its file and in a copy."""
    prompt = text(ONE)[0].tolist()
    session = stream.Session.start(model, SinkWindow("auto", W))
    list(stream.generate(model, prompt, cache=session, max_new_tokens=1, chunk_size=8))
    pins = session.cache.sink_positions.tolist()
    assert pins == [[0, 1, 2, 14]]
    session.save(tmp_path / "session")
    for other in (stream.Session.load(tmp_path / "session"), session.fork()):
        assert other.cache.sink_positions.tolist() == pins
        jax.tree.map(np.testing.assert_array_equal, other.cache, session.cache)


def test_pinned_leaves_other_caches_alone(model):
    tokens = text(ONE)
    for description in (SinkWindow(P, W), Full(64)):
        cache = model.init_cache(description, 1)
        assert detect.pinned(model, cache, tokens) is cache
    begun = model.init_cache(SinkWindow("auto", W), 1)
    begun = dataclasses.replace(begun, time=jnp.ones(1, jnp.int32))
    assert detect.pinned(model, begun, tokens) is begun
    # Too short to tell, or nothing to find: the first tokens, as StreamingLLM.
    plain = detect.pinned(model, model.init_cache(SinkWindow("auto", W), 1), text({})[:, :3])
    assert plain.sink_positions.tolist() == [[0, 1, 2, 3]]


def test_what_is_refused(model):
    tokens = text(ONE)
    refused = {
        "method: expected one of attention, norm": {"method": "magic"},
        "max_sink_tokens: expected at least 1, got 0": {"max_sink_tokens": 0},
        "lengths: expected 1 numbers of 0 to T=56": {"lengths": [57]},
        "less than the context length of 64": {"max_sink_tokens": 64, "tokens": text({}, 70)},
        r"tokens: expected \[B, T\] with T > 0": {"tokens": tokens[0]},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            detect.detect_sinks(model, **({"tokens": tokens} | options))
