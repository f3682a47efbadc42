"""Named decoder shapes, as data.

The published ones are shapes only: pre-norm decoders with the numbers of the models they are named
after, to size a run with. Weights come from elsewhere.
"""

from typing import Any

from sinkjax.models.config import DecoderConfig

BYTES = 257  # 256 bytes and BOS
_LARGE: dict[str, Any] = dict(scan_layers=True, remat="full", dtype="bfloat16")

# What Mistral 7B, Llama 3 8B and, in each expert, Mixtral 8x7B have in common.
_WIDE_4096: dict[str, Any] = dict(
    model_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    norm_epsilon=1e-5,
    **_LARGE,
)

# gpt-oss (arXiv 2508.10925), config.json: sink logits, window 128 and full in turn, 4 experts per token;
# trained at 4,096 before YaRN. Left out: biases of the attention projections, YaRN, MXFP4 weights.
_GPT_OSS: dict[str, Any] = dict(
    vocab_size=201088,
    model_dim=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=2880,
    num_experts_per_token=4,
    mlp_activation="clamped_swiglu",
    mlp_bias=True,
    context_length=4096,
    sinks=True,
    windows=(128, None),
    rope_theta=150000.0,
    norm_epsilon=1e-5,
    **_LARGE,
)

PRESETS: dict[str, DecoderConfig] = {
    # Byte level. 0.1 M parameters beside the vocabulary: a minute on 2 CPU cores for 2,000 steps of
    # 16 x 64 bytes, long enough for attention to BOS and value-norm drain to show.
    "tiny": DecoderConfig(
        vocab_size=BYTES,
        model_dim=64,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=172,  # 8/3 D, as SwiGLU at the parameter count of a plain 4 D layer
        context_length=64,
    ),
    # Byte level, 4.5 M: an evening on a CPU, minutes on an accelerator.
    "small": DecoderConfig(
        vocab_size=BYTES,
        model_dim=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=688,
        context_length=256,
    ),
    # The size of GPT-2 (Radford et al. 2019): 12 layers, 768 wide, 1,024 tokens; RoPE and SwiGLU
    # where GPT-2 has learned positions and GELU.
    "gpt2": DecoderConfig(
        vocab_size=50257,
        model_dim=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        mlp_dim=2048,
        context_length=1024,
        norm_epsilon=1e-5,
        tied_head=True,
    ),
    # Qwen3-0.6B, config.json: QK-norm, head_dim not D/N, tied head. 596,049,920 parameters.
    "qwen3-0.6b": DecoderConfig(
        vocab_size=151936,
        model_dim=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=3072,
        context_length=40960,
        qk_norm=True,
        rope_theta=1e6,
        tied_head=True,
        **_LARGE,
    ),
    # Mistral-7B-v0.1, config.json: a window of 4,096 in every layer. 7,241,732,096 parameters.
    "mistral-7b": DecoderConfig(
        vocab_size=32000,
        context_length=32768,
        windows=(4096,),
        **_WIDE_4096,
    ),
    # Meta-Llama-3-8B, config.json. 8,030,261,248 parameters.
    "llama3-8b": DecoderConfig(
        vocab_size=128256,
        context_length=8192,
        rope_theta=500000.0,
        **_WIDE_4096,
    ),
    # Meta-Llama-3-70B, config.json. 70,553,706,496 parameters.
    "llama3-70b": DecoderConfig(
        vocab_size=128256,
        model_dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=28672,
        context_length=8192,
        rope_theta=500000.0,
        norm_epsilon=1e-5,
        **_LARGE,
    ),
    # Mixtral-8x7B-v0.1, config.json: 2 of 8 experts. 46,702,792,704 parameters.
    "mixtral-8x7b": DecoderConfig(
        vocab_size=32000,
        num_experts=8,
        num_experts_per_token=2,
        context_length=32768,
        rope_theta=1e6,
        **_WIDE_4096,
    ),
    # 20,914,757,184 parameters as published, less the 192,000 of its attention biases.
    "gpt-oss-20b": DecoderConfig(num_layers=24, num_experts=32, **_GPT_OSS),
    # 116,829,156,672 parameters as published, less the 288,000 of its attention biases.
    "gpt-oss-120b": DecoderConfig(num_layers=36, num_experts=128, **_GPT_OSS),
}


def preset(name: str) -> DecoderConfig:
    """The decoder config called ``name``.

    >>> preset("tiny").context_length
    64

    Raises:
        ValueError: lists the choices.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
