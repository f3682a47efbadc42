"""Pure functions on arrays: no parameters, no state, nothing but jax below them."""

# Attention
from sinkjax.ops.attention import AttentionStatistics as AttentionStatistics
from sinkjax.ops.attention import attention_statistics as attention_statistics
from sinkjax.ops.attention import attention_weights as attention_weights
from sinkjax.ops.attention import dot_product_attention as dot_product_attention

# Attention
from sinkjax.ops.decode import decode_attention as decode_attention

# Position
from sinkjax.ops.rope import Rope as Rope
from sinkjax.ops.rope import cos_sin as cos_sin
from sinkjax.ops.rope import rotate as rotate

# Around attention
from sinkjax.ops.activations import swiglu as swiglu
from sinkjax.ops.gates import elementwise_gate as elementwise_gate
from sinkjax.ops.gates import headwise_gate as headwise_gate
from sinkjax.ops.norms import rms_norm as rms_norm

# Training
from sinkjax.ops.losses import cross_entropy as cross_entropy
from sinkjax.ops.losses import token_nll as token_nll
