"""A head plan in the cache: what must be remembered is, and the memory is really saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.cache import Full
from sinkjax.cache.head_plan import HeadPlan
from sinkjax.models import from_parameters, parameters, unroll

P, W, B = 2, 17, 5


@pytest.fixture(scope="module")
def model(planted):
    """The two layers that do something."""
    config = dataclasses.replace(
        planted.model.config, num_layers=2, windows=(None,), scan_layers=False
    )
    params = parameters(unroll(planted.model))
    return from_parameters(config, params | {"blocks": {i: params["blocks"][i] for i in range(2)}})


@pytest.fixture(scope="module")
def plan(planted, model):
    return HeadPlan(planted.retrieval[:2], P, W).check(2, model.config.num_kv_heads)


def test_passkeys_are_found_with_the_plan_and_not_with_streaming_heads_alone(planted, model, plan):
    batch = planted.task.rows(np.arange(B))
    T = batch["tokens"].shape[1]
    counts = batch["loss_mask"] == 1
    whole = jax.jit(lambda model, tokens: model(tokens).logits)(model, batch["tokens"])
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))

    def through(description):
        cache, logits = model.init_cache(description, B), []
        for chunk in np.split(batch["tokens"], 2, axis=1):
            output = step(model, chunk, cache)
            logits.append(output.logits)
            cache = output.cache
        return jnp.concatenate(logits, axis=1)[counts]

    right = batch["targets"][counts]
    found = through(plan.description(T))
    np.testing.assert_allclose(found, whole[counts], atol=1e-4)
    assert (found.argmax(-1) == right).all()
    lost = through(plan.streaming)
    assert (lost.argmax(-1) != right).mean() > 0.9


def test_memory_shrinks_by_the_share_of_the_slots(model, plan):
    length, H = 59, 64
    full, kept = (
        jax.eval_shape(lambda d=d: model.init_cache(d, B))
        for d in (Full(length), plan.description(length))
    )
    slot = 2 * 4 * B * H  # key and value in float32
    clocks = 4 * B
    # Positions are shared by what has one layout.
    assert full.nbytes == 2 * 3 * length * slot + 4 * B * length + clocks
    heads = 2 * length + 4 * (P + W)
    assert kept.nbytes == heads * slot + 4 * B * (length + P + W) + clocks
    assert heads / (2 * 3 * length) == pytest.approx(plan.share(length))
