"""What can be varied in a layer: one frozen dataclass that every config inherits."""

import dataclasses
from typing import Literal, get_args

Gate = Literal[
    "none",
    "elementwise",
    "headwise",
    "shared",
    "query",
    "key",
    "value",
    "value_state",
    "output",
    "conditional_token",
    "conditional_token_mlp",
    "conditional_head",
    "unconditional_head",
]
GateActivation = Literal["sigmoid", "twice_sigmoid", "silu", "additive"]
KeyValueBias = Literal["none", "key", "value", "key_value", "context"]
BiasPosition = Literal["start", "none"]
Alibi = Literal["none", "standard", "balanced"]
Norm = Literal["rms", "single_scale", "pre_affine", "gated", "dynamic_tanh"]
NormPlacement = Literal["pre", "post", "sandwich"]
DType = Literal["float32", "bfloat16", "float16", "float64"]

GATES: tuple[Gate, ...] = get_args(Gate)
DTYPES: tuple[DType, ...] = get_args(DType)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerVariant:
    """The fields that a layer and a whole model have in common: everything but sizes.

    Args:
        normalizer: logits to weights, a name of `sinkjax_kernels.normalizers` with arguments where
            it takes some: ``"softmax"``, ``"softmax_n(n=2.0)"``, ``"sigmoid(bias=-4.0)"``.
        learn_normalizer: learn the constants of the normaliser, one per query head, from where the
            description puts them: the bias of sigmoid, the offset of elastic_softmax.
        sinks: learned sink logits in the denominator, per query head; only with ``"softmax"``.
        num_sinks: how many sink logits each head has.
        token_sinks: a sink logit per token beside them, a projection of the layer's input.
        kv_bias: learned key and value that every query sees: ``"key"`` (its value is 0),
            ``"value"`` (added to the output), ``"key_value"``, or ``"context"`` (the value is added
            in proportion to the weight of the key, which takes none from the others).
        num_kv_biases: how many of them each key/value head has.
        kv_bias_position: the learned key sits at the ``"start"`` of the text (scored by the query
            after RoPE), or at ``"none"`` (scored before RoPE).
        gate: which gate, named by what it multiplies. On the attention output, from the layer's
            input: ``"elementwise"``, ``"headwise"``, ``"shared"`` by all heads; from each head's own
            slice of the input: ``"conditional_token"``, ``"conditional_token_mlp"``,
            ``"conditional_head"`` (mean over the text), ``"unconditional_head"`` (a number). Before
            attention: ``"query"``, ``"key"``, ``"value"`` from the input, ``"value_state"`` from
            the value itself. After the output projection: ``"output"``.
        gate_activation: y·sigmoid(z), y·2 sigmoid(z), y·silu(z), or y + sigmoid(z).
        gate_open: fraction that the gate lets through at the start; gives it a bias of its logit.
            None: no bias, about one half.
        gate_rescale: divide by gate_open, so that the layer starts as one without a gate.
        gate_init_std: of the gate's kernel; None is init_std. 0 starts every token alike.
        forget_gate: subtract from each logit what a learned forget gate has decayed since the key.
        alibi: linear distance bias, slopes by head; ``"balanced"`` gives half of the heads the
            opposite sign.
        distance_bias: learned logit bias per head and distance, for distances below this.
        differential: pairs of heads, the second's map subtracted from the first's.
        share_value: the value is the key before its norm and RoPE: one projection for both.
        isolate_sinks: sink tokens see themselves only; for layers that are not causal.
        qk_norm: RMSNorm with a learned gain on every query and key head, before RoPE.
        num_sink_tokens: P, first tokens that stay visible outside every window.
        rope_theta: base of the rotary embedding; None: no rotation.
        scale: of the logits; None: one over the square root of H.
        logits_soft_cap: c in c*tanh(logits/c); None: no cap.
        norm: of the blocks: RMSNorm with a gain per channel, with a ``"single_scale"``, with a gain
            before and after (``"pre_affine"``), behind a low-rank gate (``"gated"``), or
            ``"dynamic_tanh"`` in its place.
        norm_placement: norms before each half of a block, after the residual sum, or on both sides.
        norm_epsilon: added to the mean square in every norm.
        init_std: standard deviation of all kernels at the start.
        dtype: of the computation; norms, sinks and normaliser stay in float32 at least.
        param_dtype: of the stored kernels; norm gains and sinks are float32 at least.
    """

    normalizer: str = "softmax"
    learn_normalizer: bool = False
    sinks: bool = False
    num_sinks: int = 1
    token_sinks: bool = False
    kv_bias: KeyValueBias = "none"
    num_kv_biases: int = 1
    kv_bias_position: BiasPosition = "start"
    gate: Gate = "none"
    gate_activation: GateActivation = "sigmoid"
    gate_open: float | None = None
    gate_rescale: bool = False
    gate_init_std: float | None = None
    forget_gate: bool = False
    alibi: Alibi = "none"
    distance_bias: int = 0
    differential: bool = False
    share_value: bool = False
    isolate_sinks: bool = False
    qk_norm: bool = False
    num_sink_tokens: int = 0
    rope_theta: float | None = 10000.0
    scale: float | None = None
    logits_soft_cap: float | None = None
    norm: Norm = "rms"
    norm_placement: NormPlacement = "pre"
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    @property
    def has_sinks(self) -> bool:
        """Whether layers have sink logits, learned numbers or projections."""
        return self.sinks or self.token_sinks
