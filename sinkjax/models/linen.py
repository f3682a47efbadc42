"""The decoder for users of Flax Linen, through ``nnx.bridge``."""

import flax.linen as nn
from flax import nnx

from sinkjax.models.config import DecoderConfig
from sinkjax.models.decoder import Decoder


def decoder(config: DecoderConfig, *, name: str | None = None) -> nn.Module:
    """`sinkjax.models.Decoder` as a Linen module."""
    return nnx.bridge.to_linen(Decoder, config, name=name)
