"""A decoder of experts: one set of numbers however it is run, and what is returned about its routers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import SinkWindow
from sinkjax.models import (
    Decoder,
    DecoderConfig,
    abstract,
    config_from_json,
    config_to_json,
    count,
    from_parameters,
    linen,
    parameters,
    unroll,
)
from sinkjax.stream.detect import detect_sinks
from sinkjax.train.config import PenaltyConfig, RunConfig
from sinkjax.train.optim import decay_mask, muon_parameters

E, D, F = 5, 14, 11
CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=D,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=F,
    num_experts=E,
    num_experts_per_token=3,
    mlp_activation="clamped_swiglu",
    mlp_bias=True,
    context_length=64,
    sinks=True,
    windows=(4,),
    init_std=0.4,
    scan_layers=True,
    remat="full",
)
PLAIN = dataclasses.replace(CONFIG, scan_layers=False, remat="none")
B, T = 2, 9
PENALTIES = ("load_balancing", "router_z_loss")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (B, T)))
SEGMENTS = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return from_parameters(PLAIN, jax.tree.map(draw, parameters(abstract(PLAIN))))


@jax.jit
def everything(model):
    def loss(model):
        output = model(TOKENS, segment_ids=SEGMENTS, statistics=True, penalties=PENALTIES)
        return (output.hidden**2).sum() + 100 * sum(output.aux.values()), output

    gradient, output = jax.grad(loss, has_aux=True)(model)
    return output, parameters(gradient)


@pytest.mark.slow
def test_scanned_and_rematerialised():
    scanned = Decoder(CONFIG, rngs=nnx.Rngs(0))
    experts = parameters(scanned)["blocks"][0]["mlp"]["experts"]
    assert float(experts["down"]["kernel"].std()) == pytest.approx(0.4, rel=0.05)
    assert not experts["up"]["bias"].any()
    plain = from_parameters(PLAIN, parameters(unroll(scanned)))
    want_output, want = everything(plain)
    # Every parameter of router and experts takes part.
    moving = jax.tree.map(lambda x: bool(jnp.abs(x).max() > 0), want["blocks"][0]["mlp"])
    assert jax.tree.leaves(moving) == [True] * 8
    layers = [want["blocks"][i] for i in range(2)]
    want |= {"blocks": {0: jax.tree.map(lambda *x: jnp.stack(x), *layers)}}
    for got, other in zip(
        jax.tree.leaves(everything(scanned)), jax.tree.leaves((want_output, want)), strict=True
    ):
        np.testing.assert_allclose(got, other, atol=3e-5 * max(float(jnp.abs(other).max()), 1))


def test_what_is_returned_about_the_routers(model):
    """Against the router's own logits: padding counts in nothing, layers are averaged."""

    @jax.jit
    def captured(model):
        call = nnx.capture(model, nnx.Intermediate)
        return call(TOKENS, segment_ids=SEGMENTS, statistics=True, penalties=PENALTIES)

    output, found = captured(model)
    blocks = nnx.to_pure_dict(found)["blocks"]
    z = np.stack([np.asarray(blocks[i]["mlp"]["router_logits"][0], np.float64) for i in range(2)])
    real = np.asarray(SEGMENTS) != 0
    square = (np.log(np.exp(z).sum(-1)) ** 2)[:, real].mean()
    np.testing.assert_allclose(output.aux["router_z_loss"], square, rtol=1e-4)
    chosen = np.argsort(-z, axis=-1)[..., :3]
    picks = (chosen[..., None] == np.arange(E)).sum(-2)  # [L, B, T, E]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    balance = [E * (picks[i][real].mean(0) / 3 * p[i][real].mean(0)).sum() for i in range(2)]
    np.testing.assert_allclose(output.aux["load_balancing"], np.mean(balance), rtol=1e-4)
    total = np.where(real[..., None], picks, 0).sum(2)
    share = total / total.sum(-1, keepdims=True)
    np.testing.assert_allclose(output.statistics["expert_share"], share, rtol=1e-5)


@pytest.mark.slow
def test_through_a_cache(model):
    """Chunks of 5, 1, 1, 1, 1 tokens choose the experts that the whole text chooses."""
    cache = model.init_cache(SinkWindow(num_sink_tokens=0, window=4, position_mode="absolute"), B)
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache, statistics=True))
    logits, shares = [], []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        output = step(model, TOKENS[:, start:stop], cache)
        cache = output.cache
        logits.append(output.logits)
        shares.append((stop - start) * output.statistics["expert_share"])
    want = jax.jit(lambda model: model(TOKENS, statistics=True))(model)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), want.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(shares) / T, want.statistics["expert_share"], atol=1e-6)


@pytest.mark.slow
def test_linen(model):
    module = linen.decoder(PLAIN)
    variables = module.init(jax.random.key(0), TOKENS)
    given = jax.tree.map(jnp.shape, nn.unbox(variables["params"]))
    assert given == jax.tree.map(jnp.shape, parameters(model))
    output = jax.jit(module.apply)({"params": parameters(model)}, TOKENS)
    np.testing.assert_allclose(output.logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_config_and_count():
    assert config_from_json(config_to_json(CONFIG)) == CONFIG
    assert CONFIG.mlp.num_experts == E and CONFIG.mlp.mlp_bias
    router, experts = D * E + E, E * (3 * D * F + 2 * F + D)
    dense = dataclasses.replace(CONFIG, num_experts=0, mlp_bias=False)
    assert count(CONFIG) - count(dense) == 2 * (router + experts - 3 * D * F)
    with pytest.raises(ValueError, match="num_experts_per_token: expected 1 to num_experts=2, got"):
        dataclasses.replace(CONFIG, num_experts=2)


def test_router_losses_need_experts(model):
    dense = dataclasses.replace(PLAIN, num_experts=0, mlp_bias=False)
    with pytest.raises(ValueError, match="penalties: expected experts with router_z_loss, got no"):
        abstract(dense)(TOKENS, penalties=("router_z_loss",))
    weights = PenaltyConfig(load_balancing=0.01)
    with pytest.raises(ValueError, match="penalties.load_balancing: expected 0 with model.num_exp"):
        RunConfig(model=dense, penalties=weights)
    assert RunConfig(model=CONFIG, penalties=weights).penalties.weights == {"load_balancing": 0.01}


def test_sinks_by_what_a_down_projection_is_given_need_one():
    with pytest.raises(ValueError, match="method: expected another than 'norm' for a mixture"):
        detect_sinks(abstract(CONFIG), TOKENS, method="norm")


def test_optimisers_know_the_parameters():
    params = parameters(abstract(CONFIG))
    muon = {name for name in muon_parameters(params) if "/mlp/" in name}
    assert muon == {f"blocks/0/mlp/experts/{n}/kernel" for n in ("gate", "up", "down")}
    decays = decay_mask(params, RunConfig().optimizer.no_decay)["blocks"][0]["mlp"]
    assert decays["router"] == {"kernel": True, "bias": False}
    assert decays["experts"]["down"] == {"kernel": True, "bias": False}
