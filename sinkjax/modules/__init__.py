"""Flax NNX modules: they own parameters and call `sinkjax.ops`.

Written for NNX's tree mode: a frozen config and ``rngs`` in, no shared submodules, no mutation in
``__call__``. `sinkjax.modules.linen` offers them to Flax Linen.
"""

from sinkjax.modules.attention import Attention as Attention
from sinkjax.modules.attention import AttentionConfig as AttentionConfig
from sinkjax.modules.block import Block as Block
from sinkjax.modules.gate import Gate as Gate
from sinkjax.modules.mlp import MLP as MLP
from sinkjax.modules.mlp import MLPVariant as MLPVariant
from sinkjax.modules.moe import MoE as MoE
from sinkjax.modules.norm import DynamicTanh as DynamicTanh
from sinkjax.modules.norm import GatedNorm as GatedNorm
from sinkjax.modules.norm import PreAffineNorm as PreAffineNorm
from sinkjax.modules.norm import RMSNorm as RMSNorm
from sinkjax.modules.norm import SingleScaleNorm as SingleScaleNorm
from sinkjax.modules.norm import make_norm as make_norm
from sinkjax.modules.projection import Projection as Projection
from sinkjax.modules.registers import Registers as Registers
from sinkjax.modules.tap import tap as tap
from sinkjax.modules.variant import LayerVariant as LayerVariant
