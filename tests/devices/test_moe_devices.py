"""Experts on meshes of 8 devices: one device's numbers, and kernels that stay where their experts are."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters
from sinkjax.ops import moe
from sinkjax.sharding import batch_sharding, make_mesh, shardings
from sinkjax.train.config import DataConfig, OptimizerConfig, PenaltyConfig, RunConfig
from sinkjax.train.step import init_state, make_train_step
from sinkjax.train.tasks import Backcopy

B, T, D, F, E, k = 8, 6, 16, 20, 12, 3
MESHES = [(2, 2, 1, 2), (2, 4, 1, 1), (2, 2, 2, 1)]
CONFIG = DecoderConfig(
    vocab_size=36,
    model_dim=16,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=F,
    num_experts=E,
    num_experts_per_token=k,
    mlp_activation="clamped_swiglu",
    mlp_bias=True,
    context_length=64,
    init_std=0.3,
    scan_layers=True,
    remat="full",
)


def mesh_of(sizes, explicit):
    data, expert, sequence, model = sizes
    return make_mesh(data, model, expert=expert, sequence=sequence, explicit=explicit)


def agree(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        size = float(np.abs(b).max())
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path)
        )


def layer(x, logits, experts):
    kernels = {name: part["kernel"] for name, part in experts.items()}
    kernels |= {f"{name}_bias": part["bias"] for name, part in experts.items()}
    weights, chosen = moe.route(logits, k)
    out = moe.mixture(x, weights, chosen, kernels)
    return jnp.sin(out).sum() + moe.load_balancing_loss(logits, chosen), out


both = jax.grad(layer, (0, 1, 2), has_aux=True)


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) / 3).astype(np.float32)

    experts = {
        "gate": {"kernel": draw(E, D, F), "bias": draw(E, F)},
        "up": {"kernel": draw(E, D, F), "bias": draw(E, F)},
        "down": {"kernel": draw(E, F, D), "bias": draw(E, D)},
    }
    return draw(B, T, D), draw(B, T, E), experts


@pytest.fixture(scope="module")
def alone(operands):
    return jax.jit(both)(*operands)


@pytest.mark.parametrize(
    ("sizes", "explicit"),
    [
        (MESHES[0], False),
        (MESHES[1], True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (MESHES[0], True),
                (MESHES[1], False),
                (MESHES[2], False),
                (MESHES[2], True),
            )
        ),
    ],
)
def test_a_layer_is_that_of_one_device(operands, alone, sizes, explicit):
    mesh = mesh_of(sizes, explicit)
    x, logits, experts = operands
    rules = shardings({"mlp": {"experts": experts}}, mesh)["mlp"]["experts"]
    with jax.set_mesh(mesh):
        placed = (
            *(jax.device_put(a, batch_sharding(mesh)) for a in (x, logits)),
            jax.device_put(experts, rules),
        )
        run = jax.jit(both, out_shardings=((None, None, rules), None))
        compiled = run.lower(*placed).compile()
        agree(compiled(*placed), alone)
    # Kernels are gathered over `data` and `sequence`: never all experts in one place.
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    shapes = [tuple(map(int, shape.split(","))) for shape in gathered]
    assert (E // sizes[1], D, F // sizes[3]) in shapes
    assert not [shape for shape in shapes if len(shape) > 2 and shape[0] == E]


@pytest.mark.slow
def test_a_batch_that_does_not_divide(operands):
    """One row, as in decoding: every device of the group computes for it with its own experts."""
    x, logits, experts = operands
    want, _ = jax.jit(both)(x[:1], logits[:1], experts)
    with jax.set_mesh(mesh_of((2, 2, 1, 2), False)):
        agree(jax.jit(both)(x[:1], logits[:1], experts)[0], want)


def _loss(params, tokens, segments):
    output = from_parameters(CONFIG, params)(
        tokens,
        segment_ids=segments,
        penalties=("load_balancing", "router_z_loss"),
        statistics=True,
    )
    loss = jax.nn.logsumexp(output.logits, axis=-1).mean() + sum(output.aux.values())
    return loss, output.statistics["expert_share"]


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("sizes", MESHES[:2])
def test_a_decoder_is_that_of_one_device(sizes, explicit):
    params = parameters(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 36, (B, 14))
    segments = np.where(np.arange(14) < 11, 1, 0) * np.ones((B, 1), int)
    run = jax.jit(jax.value_and_grad(_loss, has_aux=True))
    want = run(params, tokens, segments)
    mesh = mesh_of(sizes, explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        rows = (jax.device_put(a, batch_sharding(mesh)) for a in (tokens, segments))
        agree(run(placed, *rows), want)


RUN = RunConfig(
    model=dataclasses.replace(CONFIG, vocab_size=67, context_length=13, init_std=0.02),
    data=DataConfig(source="backcopy", batch_size=8),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=1),
    penalties=PenaltyConfig(load_balancing=0.01, router_z_loss=0.001),
    steps=7,
)


def _steps(mesh):
    state, step = init_state(RUN, mesh), make_train_step(RUN, mesh)
    found = []
    with jax.set_mesh(mesh):
        for n in range(3):
            batch = Backcopy(13, seed=1).rows(np.arange(8 * n, 8 * n + 8))
            state, metrics = step(state, batch)
            found.append([float(metrics[n]) for n in ("loss", "load_balancing", "gradient_norm")])
    return found, state


@pytest.mark.slow
def test_a_training_step_is_that_of_one_device():
    want, _ = _steps(make_mesh())
    got, state = _steps(mesh_of((2, 2, 1, 2), False))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    kernel = state.params["blocks"][0]["mlp"]["experts"]["gate"]["kernel"]
    assert kernel.shape == (2, E, D, F)
    assert kernel.addressable_shards[0].data.shape == (2, E // 2, D // 2, F // 2)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)
