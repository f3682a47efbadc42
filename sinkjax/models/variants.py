"""The attention variants of the survey by name: the fields in which each differs from softmax.

One table for experiments, tests and readers. `sinkjax/ops/README.md` has the sources.
"""

import math
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """What a variant changes.

    Attributes:
        group: "normalizer", "gate", "bias" (also sink logits and extra tokens) or "norm".
        fields: of `DecoderConfig`.
    """

    group: str
    fields: dict[str, Any]


def variants(context_length: int) -> dict[str, Variant]:
    """Every variant by name, plain softmax first.

    Args:
        context_length: T; the constants that published settings tie to it (bias −ln T of sigmoid).

    Returns:
        name -> `Variant`; `dataclasses.replace(config, **variant.fields)` applies one.

    >>> variants(32)["softmax1"].fields
    {'normalizer': 'softmax1'}
    """
    normalizers: dict[str, str | dict[str, Any]] = {
        "softmax": "softmax",
        "softmax1": "softmax1",
        "softmax_n, n = 4": "softmax_n(n=4.0)",
        "softpick": "softpick",
        "rectified-only": "rectified_only",
        "scaled softpick": {"normalizer": "scaled_softpick", "learn_normalizer": True},
        "ReLU-softmax": "relu_softmax",
        "SigSoftmax": "sigsoftmax",
        "sigmoid, bias -ln T": f"sigmoid(bias={-math.log(context_length):.4f})",
        "sigmoid, learned bias": {
            "normalizer": f"sigmoid(bias={-math.log(context_length):.4f})",
            "learn_normalizer": True,
        },
        "sigmoid, no bias": "sigmoid",
        "sigmoid, normalized": "sigmoid(normalized=True)",
        "ReLU / T": f"relu(divisor={context_length:.1f})",
        "ReLU, normalized": "relu(normalized=True)",
        "ELU+1": "elu",
        "ELU+1, normalized": "elu(normalized=True)",
        "identity": "identity",
        "ConSmax": {"normalizer": "consmax", "learn_normalizer": True},
        "clipped softmax": "clipped_softmax(alpha=2.0)",
        "normalized clipped softmax": "normalized_clipped_softmax(alpha=2.0)",
        "elastic softmax": {
            "normalizer": "elastic_softmax",
            "learn_normalizer": True,
            "distance_bias": min(context_length, 512),
        },
        "sparsemax": "sparsemax",
        "entmax 1.5": "entmax15",
        "SSMax": {"normalizer": "ssmax(scale=0.5)", "learn_normalizer": True},
        "cog": "cog",
        "stick-breaking": {"normalizer": "stick_breaking", "rope_theta": None},
        "forgetting": {"forget_gate": True},
        "differential": {"differential": True},
        "SWAT": {
            "normalizer": f"sigmoid(bias={-math.log(context_length):.4f})",
            "alibi": "balanced",
        },
    }
    gates: dict[str, str | dict[str, Any]] = {
        "gate, element-wise": "elementwise",
        "gate, head-wise": "headwise",
        "gate, head-shared": "shared",
        "gate, query": "query",
        "gate, key": "key",
        "gate, value": "value",
        "gate, value-state": "value_state",
        "gate, output": "output",
        "gate, own slice": {"gate": "conditional_token", "gate_open": 0.25},
        "gate, own slice, MLP": {"gate": "conditional_token_mlp", "gate_open": 0.25},
        "gate, unconditional": {"gate": "unconditional_head", "gate_open": 0.25},
        "gate, open at the start": {"gate": "headwise", "gate_open": 0.98, "gate_init_std": 0.0},
        "gate, 2 sigmoid": {
            "gate": "headwise",
            "gate_activation": "twice_sigmoid",
            "gate_init_std": 0.0,
        },
        "gate, silu": {"gate": "elementwise", "gate_activation": "silu"},
        "gate, additive": {"gate": "elementwise", "gate_activation": "additive"},
    }
    biases: dict[str, dict[str, Any]] = {
        "sink logit": {"sinks": True},
        "4 sink logits": {"sinks": True, "num_sinks": 4},
        "sink logit per token": {"sinks": True, "token_sinks": True},
        "key bias": {"kv_bias": "key"},
        "key bias, no position": {"kv_bias": "key", "kv_bias_position": "none"},
        "value bias": {"kv_bias": "value"},
        "key and value bias": {"kv_bias": "key_value"},
        "4 key and value biases": {"kv_bias": "key_value", "num_kv_biases": 4},
        "context bias": {"kv_bias": "context"},
        "learned sink token": {"num_learned_sink_tokens": 1, "num_sink_tokens": 1},
        "meta tokens": {"num_learned_sink_tokens": 4, "num_sink_tokens": 4},
    }
    norms: dict[str, dict[str, Any]] = {
        "QK-norm": {"qk_norm": True},
        "single-scale norm": {"norm": "single_scale"},
        "pre-affine norm": {"norm": "pre_affine"},
        "gated norm": {"norm": "gated"},
        "dynamic tanh": {"norm": "dynamic_tanh"},
        "sandwich norm": {"norm_placement": "sandwich"},
        "post-norm": {"norm_placement": "post"},
    }
    table: dict[str, Variant] = {}
    for group, key, entries in (
        ("normalizer", "normalizer", normalizers),
        ("gate", "gate", gates),
        ("bias", "", biases),
        ("norm", "", norms),
    ):
        for name, entry in entries.items():
            table[name] = Variant(group, entry if isinstance(entry, dict) else {key: entry})
    table["softmax"] = Variant("normalizer", {})
    return table


def variant(name: str, context_length: int) -> Variant:
    """The variant called ``name``.

    Args:
        name: a key of `variants`.
        context_length: T.

    Raises:
        ValueError: lists the choices.
    """
    table = variants(context_length)
    if name not in table:
        raise ValueError(f"variant: expected one of {'; '.join(table)}; got {name!r}")
    return table[name]
