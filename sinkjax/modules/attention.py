"""Attention as a module: one class, every variant chosen by its frozen config."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sinkjax.cache import LayerState, LayerView, attend
from sinkjax.modules.norm import RMSNorm
from sinkjax.modules.projection import Projection
from sinkjax.modules.tap import tap
from sinkjax.ops.attention import (
    attention_statistics,
    attention_weights,
    dot_product_attention,
)
from sinkjax.ops.gates import elementwise_gate, headwise_gate
from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.rope import Rope, rotate
from sinkjax_kernels.normalizers import Softmax
from sinkjax_kernels.normalizers import resolve as resolve_normalizer

Gate = Literal["none", "headwise", "elementwise"]
DType = Literal["float32", "bfloat16", "float16", "float64"]
GATES: tuple[Gate, ...] = ("none", "headwise", "elementwise")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The shape and the variant of one attention layer.

    Args:
        model_dim: D, width of the residual stream.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H.
        normalizer: logits to weights, a name of `sinkjax_kernels.normalizers`.
        sinks: one learned sink logit per query head in the denominator; only with ``"softmax"``.
        gate: sigmoid gate on the attention output, scored from the input of the layer: one number
            per head or one per element. Starts at about one half (kernel N(0, init_std), no bias).
        qk_norm: RMSNorm with a learned gain on every query and key head, before RoPE.
        window: W, keys a query sees back, itself included (and forward when not causal); None: all.
        num_sink_tokens: P, first tokens that stay visible outside the window.
        is_causal: no query sees a later key.
        rope_theta: base of the rotary embedding; None: no positions at all.
        scale: of the logits; None: 1/sqrt(H).
        logits_soft_cap: c in c*tanh(logits/c); None: no cap.
        norm_epsilon: of the query and key norms.
        init_std: standard deviation of all kernels at the start.
        dtype: of the computation. Norms, sinks and softmax stay in float32 at least.
        param_dtype: of the stored kernels. Norm gains and sinks are float32 at least.

    Raises:
        ValueError: names the field, what was expected and what came.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    normalizer: str = "softmax"
    sinks: bool = False
    gate: Gate = "none"
    qk_norm: bool = False
    window: int | None = None
    num_sink_tokens: int = 0
    is_causal: bool = True
    rope_theta: float | None = 10000.0
    scale: float | None = None
    logits_soft_cap: float | None = None
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: DType = "float32"
    param_dtype: DType = "float32"

    def __post_init__(self):
        for name in ("model_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads: expected a multiple of num_kv_heads="
                f"{self.num_kv_heads}, got {self.num_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens: expected at least 0, got {self.num_sink_tokens}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number with rope_theta={self.rope_theta}, "
                f"got {self.head_dim}"
            )
        for name in ("rope_theta", "scale", "logits_soft_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")
        for name, choices in (("gate", GATES), ("dtype", DTYPES), ("param_dtype", DTYPES)):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"{name}: expected one of {expected}; got {getattr(self, name)!r}")
        normalizer = resolve_normalizer(self.normalizer)
        if self.sinks and not isinstance(normalizer, Softmax):
            raise ValueError(
                f"sinks: expected normalizer='softmax' with sinks=True, got {self.normalizer!r}"
            )

    @property
    def rope(self) -> Rope | None:
        """The rotary embedding of this layer, None without one."""
        return None if self.rope_theta is None else Rope(self.head_dim, self.rope_theta)

    @property
    def local_window_size(self) -> tuple[int, int] | None:
        """The window as (left, right), neither counting the query itself."""
        if self.window is None:
            return None
        return (self.window - 1, 0 if self.is_causal else self.window - 1)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys, RoPE and every sink variant of its config.

    q, k, v = x W_q, x W_k, x W_v;  o = attend(rope(norm(q)), rope(norm(k)), v)
    out = (sigmoid(x W_g) * o) W_o

    One wants it because a fair comparison of sink variants needs everything else to be one code.

    Parameters: ``query/kernel`` [D, N, H], ``key/kernel`` and ``value/kernel`` [D, K, H],
    ``out/kernel`` [N, H, D]; as the config asks ``sinks`` [N] (zeros: starts as softmax1),
    ``gate/kernel`` [D, N] or [D, N, H], ``query_norm/scale`` and ``key_norm/scale`` [H].

    Taps (under ``nnx.capture``): ``query key value`` before RoPE, ``query_rotated key_rotated``,
    ``weights`` [B, N, T, S], ``gate`` (the open fraction), ``attention_out`` (after the gate).

    Source: gate Qiu et al. 2025, arXiv 2505.06708, position G1; sinks gpt-oss, arXiv 2508.10925.
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        self.config = config
        D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim

        def projection(equation: str, *shape: int) -> Projection:
            return Projection(
                equation,
                shape,
                init_std=config.init_std,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                rngs=rngs,
            )

        self.query = projection("BTD,DNH->BTNH", D, N, H)
        self.key = projection("BTD,DKH->BTKH", D, K, H)
        self.value = projection("BTD,DKH->BTKH", D, K, H)
        self.out = projection("BTNH,NHD->BTD", N, H, D)
        if config.sinks:
            float_type = jnp.promote_types(config.param_dtype, jnp.float32)
            self.sinks = nnx.Param(jnp.zeros((N,), float_type))
        if config.gate == "headwise":
            self.gate = projection("BTD,DN->BTN", D, N)
        elif config.gate == "elementwise":
            self.gate = projection("BTD,DNH->BTNH", D, N, H)
        if config.qk_norm:
            epsilon, param_dtype = config.norm_epsilon, config.param_dtype
            self.query_norm = RMSNorm(H, epsilon=epsilon, param_dtype=param_dtype)
            self.key_norm = RMSNorm(H, epsilon=epsilon, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        cache: LayerView | None = None,
        statistics: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerState | None, dict[str, Array]]:
        """Attend within ``x``, or with a cache over the cached tokens and ``x``.

        Args:
            x: [B, T, D], normalised by the caller.
            positions: [B, T] or [T] in tokens, −1 is padding; None is the index in the row.
            segment_ids: [B, T] or [T]; tokens of different segments do not see each other.
            cache: the layer's view of a cache (`sinkjax.cache.Cache.layer`); needs positions.
            statistics: also reduce the fields of `AttentionStatistics` and the norms of keys
                (after RoPE) and values [B, K, S]. Not with a cache.

        Returns:
            out [B, T, D], the new layer state of the cache or None, the statistics (float32).

        Raises:
            ValueError: a cache without positions, with segments or statistics, or not causal.
        """
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        tap(self, "query", query)
        tap(self, "key", key)
        tap(self, "value", value)
        state, reduced = None, {}
        if cache is None:
            out, reduced = self._attend(query, key, value, positions, segment_ids, statistics)
        else:
            if not self.config.is_causal:
                raise ValueError("cache: expected a causal layer, got is_causal=False")
            if positions is None or segment_ids is not None or statistics:
                raise ValueError(
                    "cache: expected positions [B, T], segment_ids=None and statistics=False; got "
                    f"positions={'None' if positions is None else positions.shape}, segment_ids="
                    f"{'None' if segment_ids is None else segment_ids.shape}, {statistics=}"
                )
            out, state = self._attend_cached(cache, query, key, value, positions)
        out = self._gated(x, out)
        tap(self, "attention_out", out)
        return self.out(out), state, reduced

    @property
    def _variant(self) -> dict[str, Any]:
        """What every attention call of this layer has in common, cached or not."""
        config = self.config
        return dict(
            scale=config.scale,
            num_sink_tokens=config.num_sink_tokens,
            sinks=self.sinks[...] if config.sinks else None,
            normalizer=config.normalizer,
            logits_soft_cap=config.logits_soft_cap,
        )

    def _attend(
        self, query, key, value, positions, segment_ids, statistics
    ) -> tuple[Any, dict[str, Array]]:
        config = self.config
        if config.rope is not None:
            index = jnp.arange(query.shape[1]) if positions is None else positions
            query, key = rotate(query, index, config.rope), rotate(key, index, config.rope)
        tap(self, "query_rotated", query)
        tap(self, "key_rotated", key)
        options: dict[str, Any] = self._variant | dict(
            is_causal=config.is_causal,
            local_window_size=config.local_window_size,
            query_positions=positions,
            key_positions=positions,
            query_segment_ids=segment_ids,
            key_segment_ids=segment_ids,
        )
        tap(self, "weights", lambda: attention_weights(query, key, **options))
        if not statistics:
            return dot_product_attention(query, key, value, **options), {}
        lse = None
        if resolve_normalizer(config.normalizer).has_log_sum_exp:
            out, lse = dot_product_attention(query, key, value, **options, return_residual=True)
        else:
            out = dot_product_attention(query, key, value, **options)
        reduced = attention_statistics(query, key, **options, lse=lse)._asdict()
        # Numbers to look at, not to train on: a gradient would double the backward pass.
        reduced["key_norm"] = _head_norm(key)
        reduced["value_norm"] = _head_norm(value)
        return out, reduced

    def _attend_cached(self, cache, query, key, value, positions):
        config = self.config
        positions = jnp.broadcast_to(positions, query.shape[:2])
        return attend(
            cache,
            query,
            key,
            value,
            positions,
            rope=config.rope,
            window=config.window,
            **self._variant,
        )

    def _gated(self, x, out):
        if self.config.gate == "none":
            return out
        scores = self.gate(x)
        tap(self, "gate", lambda: jax.nn.sigmoid(scores.astype(jnp.float32)))
        if self.config.gate == "headwise":
            return headwise_gate(out, scores)
        return elementwise_gate(out, scores)


def _head_norm(x: Float[Array, "B S K H"]) -> Float[Array, "B K S"]:
    norm = jnp.linalg.norm(at_least_float32(jax.lax.stop_gradient(x)), axis=-1)
    return norm.swapaxes(1, 2)
