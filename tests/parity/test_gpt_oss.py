"""Sink logits against the attention of gpt-oss in Hugging Face transformers.

Two levels: the function, `eager_attention_forward`, in float64; and the layer, `GptOssAttention` with
its projections and rotary embedding, in float32, as that embedding is. The masks are the ones that
the peer's own model makes from its config, so the convention of its window is compared as well.

What is set through the peer's config: no biases in the projections, and the plain rotary embedding
instead of YaRN. `modules.Attention` has neither.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax import dot_product_attention
from sinkjax.modules import Attention, AttentionConfig
from sinkjax.ops.decode import decode_attention

ROPE_THETA = 150000.0

# level, B, T, D, N, K, H, W (0: a layer that sees everything)
CASES = {
    "function_full": ("function", 2, 7, 0, 6, 2, 4, 0),
    "function_sliding": ("function", 2, 7, 0, 6, 2, 4, 3),
    "function_sliding_one_key_head": ("function", 1, 9, 0, 5, 1, 6, 4),
    "layer_full": ("layer", 2, 7, 11, 6, 2, 4, 0),
    "layer_sliding": ("layer", 2, 9, 7, 3, 3, 6, 4),
}

# The heads and the window of gpt-oss-20b. Too large to store; several tiles of the kernels.
LARGE = {
    "function_large": ("function", 1, 301, 0, 64, 8, 64, 128),
    "layer_large": ("layer", 1, 301, 53, 64, 8, 64, 128),
}
SIZES = CASES | LARGE
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make(case):
    level, B, T, D, N, K, H, _ = SIZES[case]
    rng = np.random.default_rng(list(case.encode()))

    def draw(*shape):
        return np.round(rng.normal(size=shape) * 64) / 64  # few digits: a small archive

    sinks = draw(N) * 2
    if level == "function":
        return {
            "query": draw(B, T, N, H) * 2,
            "key": draw(B, T, K, H),
            "value": draw(B, T, K, H),
            "sinks": sinks,
            "cotangent": draw(B, T, N, H),
        }
    arrays = {
        "x": draw(B, T, D),
        "sinks": sinks,
        "q_proj": draw(N * H, D) / 2,
        "k_proj": draw(K * H, D) / 2,
        "v_proj": draw(K * H, D) / 2,
        "o_proj": draw(D, N * H) / 2,
        "cotangent": draw(B, T, D),
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def ours(case, cotangent, **floats):
    """Output and gradients under the peer's names and in its layouts."""
    attend = _function if SIZES[case][0] == "function" else _layer

    @jax.jit
    def run(floats, cotangent):
        out, pull = jax.vjp(lambda floats: attend(SIZES[case], **floats), floats)
        return {"out": out} | {f"grad_{name}": x for name, x in pull(cotangent)[0].items()}

    floats = {name: jnp.asarray(x) for name, x in floats.items()}
    return jax.tree.map(np.asarray, run(floats, jnp.asarray(cotangent)))


def _function(sizes, query, key, value, sinks):
    W = sizes[-1]
    window = (W - 1, 0) if W else None
    return dot_product_attention(
        query, key, value, sinks=sinks, is_causal=True, local_window_size=window
    )


def _layer(sizes, x, sinks, **weights):
    _, _, _, D, N, K, H, W = sizes
    config = AttentionConfig(
        model_dim=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        sinks=True,
        window=W or None,
        rope_theta=ROPE_THETA,
    )
    layer = Attention(config, rngs=nnx.Rngs(0))
    layer.sinks[...] = sinks
    # torch keeps [out, in] with the heads joined; a kernel here is [D, N, H], or [N, H, D] outward.
    for name, ours in zip(PROJECTIONS, ("query", "key", "value", "out"), strict=True):
        kernel = getattr(layer, ours).kernel
        kernel[...] = weights[name].T.reshape(kernel.shape)
    return layer(x)[0]


def theirs(case, peer, cotangent, **floats):
    torch = peer("torch")
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in floats.items()}
    layer, arguments = _peer_layer(case, peer)
    if SIZES[case][0] == "function":
        gpt_oss = peer("transformers.models.gpt_oss.modeling_gpt_oss")
        query, key, value = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
        groups = query.shape[1] // key.shape[1]
        owner = types.SimpleNamespace(
            sinks=leaves["sinks"], num_key_value_groups=groups, training=False
        )
        out, _ = gpt_oss.eager_attention_forward(
            owner, query, key, value, arguments["attention_mask"].double(), key.shape[-1] ** -0.5
        )
    else:
        parameters = {f"{name}.weight": leaves[name] for name in PROJECTIONS}
        parameters["sinks"] = leaves["sinks"]
        assert set(parameters) == {name for name, _ in layer.named_parameters()}  # no biases
        out, _ = torch.func.functional_call(layer, parameters, (leaves["x"],), arguments)
    out.backward(torch.tensor(cotangent))
    grads = {f"grad_{name}": x.grad.numpy() for name, x in leaves.items()}
    return {"out": out.detach().numpy()} | grads


def _peer_layer(case, peer):
    """An attention layer of the peer's model, and the mask and rotations that the model gives it."""
    torch = peer("torch")
    gpt_oss = peer("transformers.models.gpt_oss.modeling_gpt_oss")
    _, B, T, D, N, K, H, W = SIZES[case]
    config = peer("transformers").GptOssConfig(
        num_hidden_layers=1,
        layer_types=["sliding_attention" if W else "full_attention"],
        sliding_window=W or 128,
        hidden_size=D or 8,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attn_implementation="eager",
        vocab_size=3,
        intermediate_size=4,
        num_local_experts=1,
        num_experts_per_tok=1,
    )
    model = gpt_oss.GptOssModel(config)

    class NoExperts(torch.nn.Module):  # the peer's experts want sizes that are multiples of 16
        def forward(self, x):
            return x, None

    model.layers[0].mlp = NoExperts()
    seen = []
    layer = model.layers[0].self_attn
    hook = layer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named), with_kwargs=True
    )
    with torch.no_grad():
        model(inputs_embeds=torch.zeros(B, T, config.hidden_size), use_cache=False)
    hook.remove()
    assert layer.sliding_window == (W or None)
    arguments = {name: seen[0][name] for name in ("attention_mask", "position_embeddings")}
    return layer, arguments


@pytest.mark.parametrize("case", CASES)
def test_golden(case, golden, request):
    if CASES[case][0] == "function":
        request.getfixturevalue("x64")
    inputs, results = golden.read(case)
    golden.agree(ours(case, **inputs), results)


@pytest.mark.parity
@pytest.mark.parametrize("case", SIZES)
def test_transformers(case, golden, peer, request):
    if SIZES[case][0] == "function":
        request.getfixturevalue("x64")
    inputs = make(case)
    results = theirs(case, peer, **inputs)
    if case in CASES:
        golden.settle(case, inputs, results)
    golden.agree(ours(case, **inputs), results)


def test_decoding_gives_the_last_row(golden, x64):
    """From a cache whose slots lie in another order than the text."""
    inputs, results = golden.read("function_sliding")
    _, B, T, _, _, _, _, W = CASES["function_sliding"]
    slots = np.random.default_rng(3).permutation(T)
    out = jax.jit(decode_attention, static_argnames="window")(
        jnp.asarray(inputs["query"][:, -1:]),
        jnp.asarray(inputs["key"][:, slots].swapaxes(1, 2)),
        jnp.asarray(inputs["value"][:, slots].swapaxes(1, 2)),
        query_positions=jnp.asarray(np.full((B, 1), T - 1)),
        key_positions=jnp.asarray(np.tile(slots, (B, 1))),
        window=W,
        sinks=jnp.asarray(inputs["sinks"]),
    )
    np.testing.assert_allclose(out, results["out"][:, -1:], rtol=1e-9, atol=1e-9)
