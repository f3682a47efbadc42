"""A decoder that compiles in a second, and a counter of its traces."""

import codecs
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, DecoderConfig


class Counted(Decoder):
    """Counts how often Python runs it: once per compilation."""

    traces: list[tuple[int, ...]] = []

    def __call__(self, tokens, **options):
        Counted.traces.append(tokens.shape)
        return super().__call__(tokens, **options)


class Bytes:
    """256 bytes and BOS, as the tokenizer of training."""

    bos_id = 256

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def stream_decoder(self):
        class Decoder:
            inner = codecs.getincrementaldecoder("utf-8")(errors="replace")

            def push(self, token):
                return self.inner.decode(bytes([token])) if token < 256 else ""

            def flush(self):
                return self.inner.decode(b"", final=True)

        return Decoder()


@pytest.fixture(scope="session")
def tokenizer() -> Bytes:
    return Bytes()


@pytest.fixture(scope="session")
def model() -> Counted:
    config = DecoderConfig(
        vocab_size=263,
        model_dim=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_dim=12,
        context_length=64,
        init_std=0.4,
        num_learned_sink_tokens=2,
    )
    return Counted(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def dense() -> Callable[[Decoder, list[int]], np.ndarray]:
    """Logits [T, V] of a model without a cache, by one compiled program for every length."""

    programs = {}

    def run(model, tokens):
        graph, parameters = nnx.split(model)
        if graph not in programs:
            programs[graph] = jax.jit(lambda p, x: nnx.merge(graph, p)(x).logits)
        row = np.zeros((1, 80), np.int32)  # causal: what comes after does not matter
        row[0, : len(tokens)] = tokens
        return np.array(programs[graph](parameters, row))[0, : len(tokens)]

    return run


@pytest.fixture
def traces() -> list[tuple[int, ...]]:
    """Shapes of the tokens that the model is traced with from now on."""
    Counted.traces.clear()
    return Counted.traces
