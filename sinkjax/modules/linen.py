"""The modules for users of Flax Linen, through ``nnx.bridge``.

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            out, _, _ = sinkjax.modules.linen.attention(config, name="attention")(x)
            return out

Variables land under the given name with the parameter names of the NNX module.
"""

import flax.linen as nn
from flax import nnx

from sinkjax.modules.attention import Attention, AttentionConfig
from sinkjax.modules.block import Block
from sinkjax.modules.mlp import MLPVariant


def attention(config: AttentionConfig, *, name: str | None = None) -> nn.Module:
    """`sinkjax.modules.Attention` as a Linen module."""
    return nnx.bridge.to_linen(Attention, config, name=name)


def block(
    config: AttentionConfig,
    mlp_dim: int,
    *,
    mlp: MLPVariant = MLPVariant(),  # noqa: B008 - frozen
    name: str | None = None,
) -> nn.Module:
    """`sinkjax.modules.Block` as a Linen module."""
    return nnx.bridge.to_linen(Block, config, mlp_dim, mlp=mlp, name=name)
