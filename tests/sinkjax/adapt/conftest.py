"""A small model whose weights are set by hand, so that every head's class is known."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.adapt import toy_passkeys
from sinkjax.models import DecoderConfig, abstract, from_parameters, parameters

LENGTH, PASSKEYS, WORDS, FILLERS = 62, 3, 6, 5
VOCAB = 4 + PASSKEYS + WORDS + FILLERS
BOS, INTRO = 0, 1
# Residual stream: the token, the one before it, what was copied, a constant, four notes.
TOKEN, BEFORE, COPY = 0, VOCAB, 2 * VOCAB
ONE, NOTES = 3 * VOCAB, 3 * VOCAB + 1
WIDTH = NOTES + 4
# Pairs of a head: the first turn fast and tell distances, the last hardly turn and tell tokens.
SIZE, FAST, SLOW, THETA = 64, 8, 16, 1e6
RETRIEVAL = ((False, False, True), (False, True, False), (False, False, False))

CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    model_dim=WIDTH,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=SIZE,
    mlp_dim=5,
    context_length=LENGTH,
    rope_theta=THETA,
    scale=1.0,
    windows=(None, None, 4),
    scan_layers=True,
)


def planted_decoder():
    """Heads, two queries each: (0, 0) the token before, (0, 1) BOS, (0, 2) the intros of passkeys,
    (1, 0) the token itself, (1, 1) what followed this token earlier on, (1, 2) BOS; the third
    layer, which has a window of its own, does nothing."""
    shapes = parameters(abstract(CONFIG))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["final_norm"]["scale"] += 1
    params["embedding"]["embedding"][:, :VOCAB] = np.eye(VOCAB)
    params["embedding"]["embedding"][:, ONE] = 1
    params["head"]["kernel"][COPY : COPY + VOCAB] = 4 * np.eye(VOCAB)
    tokens = np.arange(VOCAB)
    slow = np.concatenate([np.arange(SLOW, SIZE // 2), np.arange(SIZE // 2 + SLOW, SIZE)])
    spots, rest = slow[:VOCAB], slow[VOCAB]  # channels of the tokens and of the constant
    near = np.arange(FAST)
    for layer, block in params["blocks"].items():
        block["attention_norm"]["scale"] += 1
        query, key, value, out = (
            block["attention"][name]["kernel"][0] for name in ("query", "key", "value", "out")
        )

        def at_distance(head, distance, query=query, key=key):
            angle = distance * THETA ** (-near / (SIZE / 2))
            for n in (2 * head, 2 * head + 1):
                query[ONE, n, near] = 2 * np.cos(angle)
                query[ONE, n, near + SIZE // 2] = -2 * np.sin(angle)
            key[ONE, head, near] = 2

        def at_token(head, token, weight, query=query, key=key):
            query[ONE, 2 * head : 2 * head + 2, rest] = 2
            key[token, head, rest] = weight

        def write(head, source, target, count=1, gain=1.0, value=value, out=out):
            index = np.arange(count)
            value[source + index, head, index] = 1
            for n in (2 * head, 2 * head + 1):
                out[n, index, target + index] = gain / 2

        if layer == 0:
            at_distance(0, 1)
            write(0, TOKEN, BEFORE, VOCAB, gain=0.2)
            at_token(1, BOS, 2)
            write(1, BOS, NOTES, gain=0.1)
            at_token(2, INTRO, 2)
            at_token(2, BOS, 1)
            write(2, INTRO, NOTES + 1, gain=0.5)
        elif layer == 1:
            at_distance(0, 0)
            write(0, ONE, NOTES + 2, gain=0.1)
            for n in (2, 3):
                query[TOKEN + tokens, n, spots] = 4
            key[BEFORE + tokens, 1, spots] = 4
            at_token(1, BOS, 1)
            write(1, TOKEN, COPY, VOCAB, gain=0.5)
            at_token(2, BOS, 2)
            write(2, BOS, NOTES + 3, gain=0.1)
    return from_parameters(CONFIG, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="session")
def planted():
    """The model, its task and which of its heads retrieve."""
    task = toy_passkeys(LENGTH, num_passkeys=PASSKEYS, num_words=WORDS, num_fillers=FILLERS, seed=1)
    task = dataclasses.replace(task, depths=(0.05, 0.5))  # no passkey in the window of the answer
    return types.SimpleNamespace(model=planted_decoder(), task=task, retrieval=RETRIEVAL)
