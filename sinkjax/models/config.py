"""The frozen description of a decoder."""

import dataclasses
from typing import Literal

from sinkjax.modules.attention import AttentionConfig
from sinkjax.modules.mlp import MLPVariant
from sinkjax.modules.variant import LayerVariant

Remat = Literal["none", "full", "dots", "attention"]
SinkLayers = Literal["all", "windowed"]
REMATS: tuple[Remat, ...] = ("none", "full", "dots", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(MLPVariant, LayerVariant):
    """Everything that makes one decoder: shape, attention variant, layer pattern, compilation.

    The fields of `LayerVariant` and `MLPVariant` hold for every layer.

    Args:
        vocab_size: V, reserved ids included.
        model_dim: D, width of the residual stream.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H, size of a head; even with RoPE.
        mlp_dim: F, width of the feed-forward layer; with experts of one of them.
        context_length: tokens per training row; what a cache may hold rotated.
        windows: window of each layer in tokens, None for all; the pattern repeats over the layers.
        sink_layers: which layers have sink logits where there are any: all, or those with a window.
        num_learned_sink_tokens: reserved ids at the end of the vocabulary that the data pipeline
            and the prefill put before each document; counted in num_sink_tokens.
        embedding_projection: a D x D matrix after the embedding and one before the head, both
            orthogonal at the start; `sinkjax.models.merge_embedding_projection` removes them.
        tied_head: logits from the embedding table instead of a matrix of their own.
        scan_layers: stack the layers and scan over the repeating group: compile time does not grow
            with L. Same numbers; `sinkjax.models.unroll` goes back.
        remat: what the backward pass computes again: none; full, all of a layer; attention, all but
            attention, whose output [B, T, N, H] is kept; dots, all but products with weights.

    Raises:
        ValueError: names the field, what was expected and what came.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context_length: int
    windows: tuple[int | None, ...] = (None,)
    sink_layers: SinkLayers = "all"
    num_learned_sink_tokens: int = 0
    embedding_projection: bool = False
    tied_head: bool = False
    scan_layers: bool = False
    remat: Remat = "none"

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "mlp_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self.check()
        if not isinstance(self.windows, tuple) or not self.windows:
            raise ValueError(f"windows: expected a non-empty tuple, got {self.windows!r}")
        if len(self.windows) > self.num_layers:
            raise ValueError(
                f"windows: expected at most num_layers={self.num_layers} entries, "
                f"got {len(self.windows)}"
            )
        if self.scan_layers and self.num_layers % len(self.windows):
            raise ValueError(
                "num_layers: expected a multiple of the window pattern's length "
                f"{len(self.windows)} with scan_layers=True, got {self.num_layers}"
            )
        if self.remat not in REMATS:
            expected = ", ".join(REMATS)
            raise ValueError(f"remat: expected one of {expected}; got {self.remat!r}")
        if not 0 <= self.num_learned_sink_tokens < self.vocab_size:
            raise ValueError(
                "num_learned_sink_tokens: expected at least 0 and below "
                f"vocab_size={self.vocab_size}, got {self.num_learned_sink_tokens}"
            )
        windowed = any(window is not None for window in self.windows)
        if windowed and self.num_learned_sink_tokens > self.num_sink_tokens:
            raise ValueError(
                "num_sink_tokens: expected at least num_learned_sink_tokens="
                f"{self.num_learned_sink_tokens} with windows={self.windows}, "
                f"got {self.num_sink_tokens}"
            )
        if self.sink_layers == "windowed" and not (self.has_sinks and windowed):
            raise ValueError(
                "sink_layers: expected 'all' without sink logits or without windows, "
                f"got 'windowed' with sinks={self.sinks}, windows={self.windows}"
            )
        for layer in range(len(self.windows)):
            self.layer(layer)

    def layer(self, index: int) -> AttentionConfig:
        """The attention config of layer ``index``, counted from the embedding."""
        window = self.windows[index % len(self.windows)]
        variant = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(LayerVariant)
        }
        if self.sink_layers == "windowed" and window is None:
            variant |= {"sinks": False, "num_sinks": 1, "token_sinks": False}
        return AttentionConfig(
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=window,
            **variant,
        )

    @property
    def learned_sink_ids(self) -> tuple[int, ...]:
        """Reserved ids, in the order they precede a document. A sampler must never emit them."""
        return tuple(range(self.vocab_size - self.num_learned_sink_tokens, self.vocab_size))
