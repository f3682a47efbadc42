"""Mixtures of experts against the blocks of Mixtral and gpt-oss in Hugging Face transformers.

Router, experts and their sum, with gradients: gpt-oss in float64, Mixtral in float32, as its router
is. Mixtral takes the softmax over all experts and lets the chosen ones sum to 1, gpt-oss the softmax
of the chosen; the second clamps its activation and has biases everywhere. The peers' router loss,
`load_balancing_loss_func`, is k times ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops import moe
from sinkjax.ops.activations import clamped_swiglu, swiglu

# peer, B, T, D, F, E, k
CASES = {
    "mixtral": ("mixtral", 2, 7, 5, 6, 4, 2),
    "gpt_oss": ("gpt_oss", 2, 5, 6, 7, 5, 3),
}


def make(case):
    peer, B, T, D, F, E, _ = CASES[case]
    rng = np.random.default_rng(list(case.encode()))

    def draw(*shape):
        return np.round(rng.normal(size=shape) * 64) / 64  # few digits: a small archive

    arrays = {
        "x": draw(B, T, D),
        "router": draw(E, D),
        "gate": draw(E, F, D),
        "up": draw(E, F, D),
        "down": draw(E, D, F),
        "cotangent": draw(B, T, D),
    }
    if peer == "gpt_oss":
        shapes = {"router": (E,), "gate": (E, F), "up": (E, F), "down": (E, D)}
        arrays |= {f"{name}_bias": draw(*shape) for name, shape in shapes.items()}
        arrays["gate"] *= 4  # so that the clamps bite
        return arrays
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def ours(case, cotangent, **floats):
    """Output, loss and gradients under the names of `make`, in torch's layout [out, in]."""
    peer, *_, k = CASES[case]
    activation = clamped_swiglu if peer == "gpt_oss" else swiglu

    def layer(floats):
        logits = floats["x"] @ floats["router"].T + floats.get("router_bias", 0)
        weights, experts = moe.route(logits, k)
        kernels = {name: floats[name].swapaxes(1, 2) for name in ("gate", "up", "down")}
        names = ("gate_bias", "up_bias", "down_bias")
        kernels |= {name: floats[name] for name in names if name in floats}
        out = moe.mixture(floats["x"], weights, experts, kernels, activation)
        return out, moe.load_balancing_loss(logits, experts)

    @jax.jit
    def run(floats, cotangent):
        (out, loss), pull = jax.vjp(layer, floats)
        (grads,) = pull((cotangent, jnp.zeros_like(loss)))
        found = {"out": out, "load_balancing": loss.astype(jnp.float32)}
        return found | {f"grad_{n}": x for n, x in grads.items()}

    floats = {name: jnp.asarray(x) for name, x in floats.items()}
    return jax.tree.map(np.asarray, run(floats, jnp.asarray(cotangent)))


def theirs(case, peer, cotangent, **floats):
    torch = peer("torch")
    name, _, _, D, F, E, k = CASES[case]
    leaves = {n: torch.tensor(x, requires_grad=True) for n, x in floats.items()}
    sizes = dict(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=k
    ) | dict(experts_implementation="eager")
    modeling = peer(f"transformers.models.{name}.modeling_{name}")
    if name == "mixtral":
        block = modeling.MixtralSparseMoeBlock(peer("transformers").MixtralConfig(**sizes))
        parameters = {
            "gate.weight": leaves["router"],
            "experts.gate_up_proj": torch.cat([leaves["gate"], leaves["up"]], dim=1),
            "experts.down_proj": leaves["down"],
        }
    else:
        block = modeling.GptOssMLP(peer("transformers").GptOssConfig(**sizes))
        mixed = torch.stack([leaves["gate"], leaves["up"]], dim=2).flatten(1, 2)  # in turn
        parameters = {
            "router.weight": leaves["router"],
            "router.bias": leaves["router_bias"],
            "experts.gate_up_proj": mixed.transpose(1, 2),
            "experts.gate_up_proj_bias": torch.stack(
                [leaves["gate_bias"], leaves["up_bias"]], dim=2
            ).flatten(1),
            "experts.down_proj": leaves["down"].transpose(1, 2),
            "experts.down_proj_bias": leaves["down_bias"],
        }
    block = block.to(leaves["x"].dtype)
    assert set(parameters) == {n for n, _ in block.named_parameters()}
    out = torch.func.functional_call(block, parameters, (leaves["x"],))
    out = out[0] if isinstance(out, tuple) else out
    out.backward(torch.tensor(cotangent))
    logits = leaves["x"].reshape(-1, D) @ leaves["router"].T + leaves.get("router_bias", 0)
    # Some releases sum it in float32, others in the type of the logits.
    loss = modeling.load_balancing_loss_func((logits.detach(),), E, k).float() / k
    grads = {f"grad_{n}": x.grad.numpy() for n, x in leaves.items()}
    return {"out": out.detach().numpy(), "load_balancing": loss.numpy()} | grads


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, request):
    if CASES[case][0] == "gpt_oss":
        request.getfixturevalue("x64")
    inputs, results = golden.read(case)
    golden.agree(ours(case, **inputs), results)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers(case, golden, peer, request):
    if CASES[case][0] == "gpt_oss":
        request.getfixturevalue("x64")
    inputs = make(case)
    results = theirs(case, peer, **inputs)
    golden.settle(case, inputs, results)
    golden.agree(ours(case, **inputs), results)
