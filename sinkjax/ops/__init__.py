"""Pure functions on arrays: no parameters, no state, nothing but jax below them."""

# Attention
from sinkjax.ops.attention import AttentionStatistics as AttentionStatistics
from sinkjax.ops.attention import attention_statistics as attention_statistics
from sinkjax.ops.attention import attention_weights as attention_weights
from sinkjax.ops.attention import dot_product_attention as dot_product_attention

# Normalisers: their descriptions, `resolve` and the specification, `weights`
from sinkjax_kernels import normalizers as normalizers

# Decoding
from sinkjax.ops.decode import decode_attention as decode_attention
from sinkjax.ops.decode import decode_step as decode_step

# Position
from sinkjax.ops.rope import Rope as Rope
from sinkjax.ops.rope import cos_sin as cos_sin
from sinkjax.ops.rope import rotate as rotate
from sinkjax.ops.positions import alibi_bias as alibi_bias
from sinkjax.ops.positions import alibi_decay as alibi_decay
from sinkjax.ops.positions import alibi_slopes as alibi_slopes
from sinkjax.ops.positions import distances as distances
from sinkjax.ops.positions import learned_distance_bias as learned_distance_bias
from sinkjax.ops.forgetting import cumulative_decay as cumulative_decay
from sinkjax.ops.forgetting import decay_bias as decay_bias
from sinkjax.ops.forgetting import dense_decay_bias as dense_decay_bias
from sinkjax.ops.forgetting import log_forget as log_forget

# Learned keys and values, pairs of heads
from sinkjax.ops.slots import Slots as Slots
from sinkjax.ops.slots import add_slot_values as add_slot_values
from sinkjax.ops.slots import join_sinks as join_sinks
from sinkjax.ops.slots import slot_logits as slot_logits
from sinkjax.ops.differential import combine as combine
from sinkjax.ops.differential import differential_lambda as differential_lambda
from sinkjax.ops.differential import widen_values as widen_values

# Around attention
from sinkjax.ops.activations import clamped_swiglu as clamped_swiglu
from sinkjax.ops.activations import swiglu as swiglu
from sinkjax.ops.gates import apply_gate as apply_gate
from sinkjax.ops.gates import elementwise_gate as elementwise_gate
from sinkjax.ops.gates import gate_score as gate_score
from sinkjax.ops.gates import gate_value as gate_value
from sinkjax.ops.gates import headwise_gate as headwise_gate
from sinkjax.ops.gates import shared_gate as shared_gate
from sinkjax.ops.norms import dynamic_tanh as dynamic_tanh
from sinkjax.ops.norms import gated_norm as gated_norm
from sinkjax.ops.norms import pre_affine_norm as pre_affine_norm
from sinkjax.ops.norms import rms_norm as rms_norm
from sinkjax.ops.norms import single_scale_norm as single_scale_norm

# Mixture of experts: `route`, `mixture`, its two losses
from sinkjax.ops import moe as moe

# Training
from sinkjax.ops.head_loss import head_cross_entropy as head_cross_entropy
from sinkjax.ops.losses import cross_entropy as cross_entropy
from sinkjax.ops.losses import token_nll as token_nll
from sinkjax.ops.penalties import decorrelation as decorrelation
from sinkjax.ops.penalties import head_balance as head_balance
from sinkjax.ops.penalties import hidden_z_loss as hidden_z_loss
from sinkjax.ops.penalties import tweo as tweo

# Long prompts, small caches, tokens that are sinks
from sinkjax.ops import quantize as quantize
from sinkjax.ops import sink_detection as sink_detection
from sinkjax.ops import sparse as sparse
