"""Head gates of a model that has learned the passkey task by itself."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from sinkjax.adapt import HeadGateConfig, HeadPlan, toy_passkeys, train_head_gates
from sinkjax.cache import Full
from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters
from sinkjax.ops.losses import cross_entropy

CONFIG = DecoderConfig(
    vocab_size=28,
    model_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    mlp_dim=96,
    context_length=48,
)
STEPS, BATCH = 800, 48


@pytest.mark.slow
def test_the_gates_keep_what_passkeys_need():
    """Two layers of four heads: streaming the half that the gates name costs little, the other
    half much, and all of them everything."""
    task = toy_passkeys(48, num_passkeys=4, num_words=12, num_fillers=8)
    task = dataclasses.replace(task, depths=(0.0, 0.6))
    params = parameters(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, 50, STEPS, 1e-4)
    optimizer = optax.adamw(rate, weight_decay=0.01)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            output = from_parameters(CONFIG, params)(batch["tokens"])
            return cross_entropy(output.logits, batch["targets"], batch["loss_mask"], 0.0)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(STEPS):
        params, state = step(params, state, task.rows(np.arange(n * BATCH, (n + 1) * BATCH)))
    model = from_parameters(CONFIG, params)
    batch = task.rows(np.arange(10**6, 10**6 + 40))
    counts = batch["loss_mask"] == 1
    run = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache).logits)

    def right(description):
        logits = run(model, batch["tokens"], model.init_cache(description, 40))
        return (np.asarray(logits.argmax(-1)) == batch["targets"])[counts].mean()

    gates = HeadGateConfig(num_sink_tokens=1, window=9, steps=120, batch_size=16)
    alphas = train_head_gates(model, task, gates).alphas

    def plan(scores, sparsity):
        found = HeadPlan.from_scores(scores, sparsity=sparsity, num_sink_tokens=1, window=9)
        return found.description(48)

    assert right(Full(48)) > 0.98
    assert right(plan(alphas, 0.5)) > 0.85
    assert right(plan(-alphas, 0.5)) < 0.7
    assert right(plan(alphas, 1.0)) < 0.25
