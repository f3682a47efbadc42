r"""Floating point operations of a decoder by arithmetic, and what share of a chip they use.

Counted are matrix products alone, 2 operations for each multiply-add: norms, activations, softmax and
the optimiser are less than a hundredth of a large model and no chip's peak is about them.
"""

import dataclasses
import functools
import re

import jax
import numpy as np

from sinkjax.chips import chip_of
from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import abstract, parameters

# What a token is multiplied by as a matrix: kernels, and those of two-layer gates and low-rank norms.
_MATRICES = r"/kernel$|gate/hidden$|norm\w*/(down|up)$"


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations per token of a training step, forward and backward.

    Args:
      projections: of the weights, head included: 6 for each weight that a token passes through.
      attention: of logits and weighted sums over the visible keys.
      recomputed: what rematerialisation does a second time.
    """

    projections: float
    attention: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the mathematics asks for: the numerator of model FLOPs utilisation."""
        return self.projections + self.attention

    @property
    def hardware(self) -> float:
        """What the devices do."""
        return self.model + self.recomputed


def visible_keys(length: int, window: int | None = None, num_sink_tokens: int = 0) -> int:
    r"""Pairs of a query and a key that it sees, in one causal text.

    $$ \sum_{t=1}^{T} \min(t, W) + \min(P, \max(0, t - W)) $$

    Args:
      length: T, tokens.
      window: W, keys that a query sees back, itself included; None is all.
      num_sink_tokens: P, first tokens that stay visible outside the window.

    Example:
      >>> visible_keys(4), visible_keys(4, 2), visible_keys(4, 2, 1)
      (10, 7, 9)
    """
    seen = np.arange(1, length + 1, dtype=np.int64)
    if window is None:
        return int(seen.sum())
    outside = np.minimum(num_sink_tokens, np.maximum(seen - window, 0))
    return int((np.minimum(seen, window) + outside).sum())


@functools.cache  # a log asks at every line
def active_weights(config: DecoderConfig, *, head: bool = True) -> int:
    """Weights that one token is multiplied by.

    Of experts those that a token is sent to; of the embedding, which is looked up, none, and all of
    it when it is the head too.

    Args:
      config: the decoder.
      head: count the matrix of the logits.
    """
    total = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(parameters(abstract(config))):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path == "embedding/embedding":
            total += leaf.size if head and config.tied_head else 0
        elif path == "head/kernel":
            total += leaf.size if head else 0
        elif "/experts/" in path and path.endswith("/kernel"):
            total += leaf.size * config.num_experts_per_token // config.num_experts
        elif re.search(_MATRICES, path):
            total += leaf.size
    return total


def attention_forward(config: DecoderConfig, pairs: list[int]) -> int:
    """Operations of logits and weighted sums over so many visible pairs in each layer."""
    # Differential attention sums values of both heads of a pair under each map.
    width = 3 if config.differential else 2
    return 2 * width * config.num_heads * config.head_dim * sum(pairs)


def training_flops(config: DecoderConfig, length: int | None = None) -> Flops:
    r"""Operations per token of one training step on texts that fill their rows.

    $$ 6 N_{active} + \tfrac{3}{T} \sum_l 4 N H \cdot \text{pairs}_l $$

    A backward pass is two products for each of the forward pass. Packed rows do less attention, since
    segments do not see each other.

    Args:
      config: the decoder; its windows, sink tokens, experts and rematerialisation count.
      length: T; None is `context_length`.

    Source: Kaplan et al., arXiv:2001.08361, section 2.1; Chowdhery et al., arXiv:2204.02311,
      appendix B (model FLOPs utilisation).
    """
    length = config.context_length if length is None else length
    layers = [config.layer(index) for index in range(config.num_layers)]
    pairs = [visible_keys(length, layer.window, layer.num_sink_tokens) for layer in layers]
    attention = attention_forward(config, pairs) / length
    projections = 2 * active_weights(config)
    in_layers = 2 * _in_layers(config)
    again = {
        "none": 0.0,
        "full": in_layers + attention,
        # Neither a sum over heads nor a ragged product is what this policy keeps.
        "dots": attention + 2 * _active_expert_weights(config),
        "attention": in_layers,
    }[config.remat]
    return Flops(3 * projections, 3 * attention, again)


def _active_expert_weights(config: DecoderConfig) -> int:
    """Weights of the experts that one token is sent to."""
    if not config.num_experts:
        return 0
    sent_to_none = dataclasses.replace(config, num_experts=0, mlp_bias=False)
    router = config.num_layers * config.model_dim * config.num_experts
    dense = config.num_layers * 3 * config.model_dim * config.mlp_dim
    return active_weights(config) - router - (active_weights(sent_to_none) - dense)


def _in_layers(config: DecoderConfig) -> int:
    """Weights of the blocks alone: what rematerialisation multiplies by again."""
    projections = 2 * config.model_dim**2 if config.embedding_projection else 0
    return active_weights(config, head=False) - projections


def decode_flops(config: DecoderConfig, visible: int) -> float:
    """Operations of one decoded token.

    Args:
      config: the decoder.
      visible: keys that the token sees in a layer without a window, itself included: the slots of the
        cache that are filled. Layers with a window see no more than that and their sink tokens.
    """
    layers = [config.layer(index) for index in range(config.num_layers)]
    seen = [
        visible
        if layer.window is None
        else min(visible, layer.window + min(layer.num_sink_tokens, max(0, visible - layer.window)))
        for layer in layers
    ]
    return float(2 * active_weights(config) + attention_forward(config, seen))


def utilization(
    config: DecoderConfig, tokens_per_second: float, device_kind: str, num_devices: int
) -> float | None:
    """Model FLOPs utilisation of training: `Flops.model` per second over the peak of the devices.

    Why: it compares runs across models and chips; rematerialisation does not flatter it.

    Args:
      config: the decoder.
      tokens_per_second: of all devices together.
      device_kind: as `jax.Device.device_kind`.
      num_devices: how many `jax.Device`s.

    Returns:
      A fraction of 1; None where the peak of the device is not known, as on a CPU.

    Example:
      >>> from sinkjax.models.presets import preset
      >>> round(utilization(preset("llama3-8b"), 3000, "TPU v5p", 1), 3)
      0.336
      >>> utilization(preset("tiny"), 3000, "cpu", 1)
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    return training_flops(config).model * tokens_per_second / (chip.device_peak_flops * num_devices)
