"""The frozen description of a decoder."""

import dataclasses
from typing import Literal

from sinkjax.modules.attention import AttentionConfig, DType, Gate

Remat = Literal["none", "full", "dots"]
REMATS: tuple[Remat, ...] = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that makes one decoder: shape, attention variant, layer pattern, compilation.

    Args:
        vocab_size: V, reserved ids included.
        model_dim: D, width of the residual stream.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H, size of a head; even with RoPE.
        mlp_dim: F, width of the feed-forward layer.
        context_length: tokens per training row; what a cache may hold rotated.
        normalizer: logits to weights: softmax, softmax1, softmax_n(n=2.0), sigmoid(bias=-4.0),
            softpick.
        sinks: one learned sink logit per query head in the denominator; only with softmax.
        gate: sigmoid gate on the attention output, one number per head or one per element.
        qk_norm: RMSNorm with a learned gain on every query and key head, before RoPE.
        windows: window of each layer in tokens, None for all; the pattern repeats over the layers.
        num_sink_tokens: P, first tokens that stay visible outside every window.
        num_learned_sink_tokens: reserved ids at the end of the vocabulary that the data pipeline
            and the prefill put before each document; counted in num_sink_tokens.
        rope_theta: base of the rotary embedding; None: no positions at all.
        scale: of the logits; None: one over the square root of H.
        logits_soft_cap: c in c*tanh(logits/c); None: no cap.
        tied_head: logits from the embedding table instead of a matrix of their own.
        scan_layers: stack the layers and scan over the repeating group: compile time does not grow
            with L. Same numbers; `sinkjax.models.unroll` goes back.
        remat: what the backward pass computes again: none; full, all of a layer; dots, all but
            matrix products.
        norm_epsilon: added to the mean square in every norm.
        init_std: standard deviation of all kernels at the start.
        dtype: of the computation; norms, sinks and softmax stay in float32 at least.
        param_dtype: of the stored kernels; norm gains and sinks are float32 at least.

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
    normalizer: str = "softmax"
    sinks: bool = False
    gate: Gate = "none"
    qk_norm: bool = False
    windows: tuple[int | None, ...] = (None,)
    num_sink_tokens: int = 0
    num_learned_sink_tokens: int = 0
    rope_theta: float | None = 10000.0
    scale: float | None = None
    logits_soft_cap: float | None = None
    tied_head: bool = False
    scan_layers: bool = False
    remat: Remat = "none"
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "mlp_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
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
        for layer in range(len(self.windows)):
            self.layer(layer)

    def layer(self, index: int) -> AttentionConfig:
        """The attention config of layer ``index``, counted from the embedding."""
        return AttentionConfig(
            model_dim=self.model_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            normalizer=self.normalizer,
            sinks=self.sinks,
            gate=self.gate,
            qk_norm=self.qk_norm,
            window=self.windows[index % len(self.windows)],
            num_sink_tokens=self.num_sink_tokens,
            rope_theta=self.rope_theta,
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            norm_epsilon=self.norm_epsilon,
            init_std=self.init_std,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    @property
    def learned_sink_ids(self) -> tuple[int, ...]:
        """Reserved ids, in the order they precede a document. A sampler must never emit them."""
        return tuple(range(self.vocab_size - self.num_learned_sink_tokens, self.vocab_size))
