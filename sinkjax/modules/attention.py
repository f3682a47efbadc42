"""Attention as a module: one class, every variant chosen by its frozen config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sinkjax.cache import LayerView, attend
from sinkjax.modules.attention_config import AttentionConfig as AttentionConfig
from sinkjax.modules.gate import Gate
from sinkjax.modules.norm import RMSNorm
from sinkjax.modules.projection import Projection
from sinkjax.modules.tap import tap
from sinkjax.modules.terms import Constants, ForgetGate, KeyValueBias, Lambda, float_type
from sinkjax.ops import forgetting
from sinkjax.ops import positions as position_ops
from sinkjax.ops import slots as slot_ops
from sinkjax.ops.attention import (
    attention_statistics,
    attention_weights,
    dot_product_attention,
)
from sinkjax.ops.differential import combine, widen_values
from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.rope import rotate
from sinkjax_kernels.normalizers import Softmax, Softmax1, SoftmaxN


class Attention(nnx.Module):
    """Multi-head attention with grouped keys, RoPE and every sink variant of its config.

    q, k, v = x W_q, x W_k, x W_v;  o = attend(rope(norm(q)), rope(norm(k)), v)
    out = (sigmoid(x W_g) * o) W_o

    One wants it because a fair comparison of sink variants needs everything else to be one code.

    Parameters: ``query/kernel`` [D, N, H], ``key/kernel`` and ``value/kernel`` [D, K, H],
    ``out/kernel`` [N, H, D]; as the config asks ``sinks`` [N] or [N, num_sinks] (zeros: starts as
    softmax1), ``token_sinks/kernel`` [D, N], ``normalizer/...`` (`Constants`), ``kv_bias/key`` and
    ``kv_bias/value`` [K, m, H], ``gate/...`` (`Gate`), ``forget/kernel`` [D, N] and ``forget/bias``
    [N], ``distance_bias`` [N, R] (zeros), ``differential/...`` (`Lambda`), ``query_norm/scale`` and
    ``key_norm/scale`` [H].

    Taps (under ``nnx.capture``): ``query key value`` before RoPE, ``query_rotated key_rotated``,
    ``weights`` [B, N, T, S], ``gate`` (the open fraction), ``attention_out`` (after the gate).

    Source: of every variant, `sinkjax/ops/README.md`.
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
        if not config.share_value:
            self.value = projection("BTD,DKH->BTKH", D, K, H)
        self.out = projection("BTNH,NHD->BTD", N, H, D)
        if config.sinks:
            shape = (N,) if config.num_sinks == 1 else (N, config.num_sinks)
            self.sinks = nnx.Param(jnp.zeros(shape, float_type(config)))
        if config.token_sinks:
            self.token_sinks = projection("BTD,DN->BTN", D, N)
        if config.learn_normalizer:
            self.normalizer = Constants(config)
        if config.kv_bias != "none":
            self.kv_bias = KeyValueBias(config, rngs=rngs)
        if config.gate != "none":
            self.gate = Gate(config, rngs=rngs)
        if config.forget_gate:
            self.forget = ForgetGate(config, rngs=rngs)
        if config.distance_bias:
            self.distance_bias = nnx.Param(jnp.zeros((N, config.distance_bias), float_type(config)))
        if config.differential:
            self.differential = Lambda(config, rngs=rngs)
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
    ) -> tuple[Float[Array, "B T D"], Any | None, dict[str, Array]]:
        """Attend within ``x``, or with a cache over the cached tokens and ``x``.

        Args:
            x: [B, T, D], normalised by the caller.
            positions: [B, T] or [T] in tokens, −1 is padding; None is the index in the row, with
                segments that in the segment.
            segment_ids: [B, T] or [T]; tokens of different segments do not see each other.
            cache: the layer's view of a cache (`sinkjax.cache.Cache.layer`); needs positions.
            statistics: also reduce the fields of `AttentionStatistics` and the norms of keys
                (after RoPE) and values [B, K, S]. Not with a cache.

        Returns:
            out [B, T, D], the new layer state of the cache or None, the statistics (float32).

        Raises:
            ValueError: a cache without positions, with segments or statistics, or not causal.
        """
        config = self.config
        real = _real(x, positions, segment_ids)
        query, key = self.query(x), self.key(x)
        value = key if config.share_value else self.value(x)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = self._gated("query", query, x, real)
        key, value = self._gated("key", key, x, real), self._gated("value", value, x, real)
        tap(self, "query", query)
        tap(self, "key", key)
        tap(self, "value", value)
        state, reduced = None, {}
        if cache is None:
            out, reduced = self._attend(
                x, query, key, value, positions, segment_ids, real, statistics
            )
        else:
            if not config.is_causal:
                raise ValueError("cache: expected a causal layer, got is_causal=False")
            if positions is None or segment_ids is not None or statistics:
                raise ValueError(
                    "cache: expected positions [B, T], segment_ids=None and statistics=False; got "
                    f"positions={'None' if positions is None else positions.shape}, segment_ids="
                    f"{'None' if segment_ids is None else segment_ids.shape}, {statistics=}"
                )
            out, state = self._attend_cached(cache, x, query, key, value, positions)
        if config.differential:
            lam = self.differential()
            out = combine(out, lam, self.differential.scale[...], epsilon=config.norm_epsilon)
        out = self._gated("attention", out, x, real)
        tap(self, "attention_out", out)
        return self._gated("output", self.out(out), x, real), state, reduced

    # --- what every attention call of this layer has in common, cached or not

    @property
    def _call(self) -> dict[str, Any]:
        config = self.config
        return dict(
            scale=config.scale,
            num_sink_tokens=config.num_sink_tokens,
            logits_soft_cap=config.logits_soft_cap,
            normalizer_params=self.normalizer() if config.learn_normalizer else None,
        )

    def _sinks(self, x: Float[Array, "B T D"]) -> list[Array]:
        """Learned sink logits: per head, several per head, per token."""
        found = [self.sinks[...]] if self.config.sinks else []
        return found + ([at_least_float32(self.token_sinks(x))] if self.config.token_sinks else [])

    @property
    def _slots(self) -> slot_ops.Slots | None:
        config = self.config
        if config.kv_bias == "none":
            return None
        return self.kv_bias(config.kv_bias, config.kv_bias_position)

    def _position_bias(self, *, alibi: bool) -> Callable[[Array], Array] | None:
        """The logit bias as a function of the distance, None without one."""
        config = self.config
        terms: list[Callable[[Array], Array]] = []
        if alibi and config.alibi != "none":
            slopes = self._alibi_slopes
            terms.append(lambda distance: position_ops.alibi_bias(distance, slopes))
        if config.distance_bias:
            table = self.distance_bias[...]
            terms.append(lambda distance: position_ops.learned_distance_bias(distance, table))
        if not terms:
            return None
        return lambda distance: functools.reduce(jnp.add, [term(distance) for term in terms])

    @property
    def _alibi_slopes(self) -> Float[Array, " N"]:
        config = self.config
        slopes = position_ops.alibi_slopes(config.num_heads, balanced=config.alibi == "balanced")
        return jnp.asarray(slopes, float_type(config))

    # --- without a cache

    def _attend(
        self, x, query, key, value, positions, segment_ids, real, statistics
    ) -> tuple[Any, dict[str, Array]]:
        config, slots = self.config, self._slots
        index = jnp.arange(x.shape[1]) if positions is None else positions
        if positions is None and segment_ids is not None:
            index = position_ops.index_within_segment(jnp.atleast_2d(segment_ids))
        index = jnp.atleast_2d(index)
        slot_query = query
        if config.rope is not None:
            query, key = rotate(query, index, config.rope), rotate(key, index, config.rope)
        if config.kv_bias_position == "start":
            slot_query = query
        tap(self, "query_rotated", query)
        tap(self, "key_rotated", key)

        decay = self._decay(x, index, real)
        bias, shift = (None, None) if decay is None else forgetting.decay_bias(decay)
        position_bias = self._position_bias(alibi=decay is None)
        if position_bias is not None:
            dense = position_bias(position_ops.distances(index, index))
            bias = dense if bias is None else bias + dense
        scale, cap = config.scale, config.logits_soft_cap
        logits = slot_ops.slot_logits(slot_query, slots, scale=scale, logits_soft_cap=cap)
        normalizer, sinks = slot_ops.join_sinks(
            config.normalizer,
            *self._sinks(x),
            logits if slots is not None and slots.competes else None,
            shift=shift,
        )
        options: dict[str, Any] = self._call | dict(
            bias=bias,
            mask=_isolation(index, config.num_sink_tokens) if config.isolate_sinks else None,
            normalizer=normalizer,
            sinks=sinks,
            is_causal=config.is_causal,
            local_window_size=config.local_window_size,
            query_positions=positions,
            key_positions=positions,
            query_segment_ids=segment_ids,
            key_segment_ids=segment_ids,
        )
        tap(self, "weights", lambda: attention_weights(query, key, **options))
        values = widen_values(value) if config.differential else value
        reads_lse = slots is not None and slots.reads_lse
        lse = None
        if reads_lse or (statistics and normalizer.has_log_sum_exp):
            out, lse = dot_product_attention(query, key, values, **options, return_residual=True)
        else:
            out = dot_product_attention(query, key, values, **options)
        unshifted = lse if lse is None or shift is None else lse - shift
        out: Any = slot_ops.add_slot_values(out, slots, logits, unshifted, where=real)
        if not statistics:
            return out, {}
        reduced = attention_statistics(query, key, **options, lse=lse)._asdict()
        if shift is not None:
            reduced["max_logit"] -= jax.lax.stop_gradient(shift).swapaxes(1, 2)
        # Numbers to look at, not to train on: a gradient would double the backward pass.
        reduced["key_norm"] = _head_norm(key)
        reduced["value_norm"] = _head_norm(value)
        return out, reduced

    def _decay(self, x, index, real) -> Float[Array, "B T N"] | None:
        """What fades with distance, where the normaliser allows for it in memory linear in T."""
        config = self.config
        if config.forget_gate:
            return forgetting.cumulative_decay(forgetting.log_forget(self.forget(x), real))
        exp_sum = isinstance(config.described_normalizer, Softmax | Softmax1 | SoftmaxN)
        if config.alibi == "none" or not (config.is_causal and exp_sum):
            return None
        decay = position_ops.alibi_decay(index, self._alibi_slopes)
        return jnp.broadcast_to(decay, (x.shape[0], *decay.shape[1:]))

    # --- with a cache

    def _attend_cached(self, cache, x, query, key, value, positions):
        config = self.config
        positions = jnp.broadcast_to(positions, query.shape[:2])
        normalizer, sinks = slot_ops.join_sinks(config.normalizer, *self._sinks(x))
        log_forget = None
        if config.forget_gate:
            log_forget = forgetting.log_forget(self.forget(x), positions >= 0)
        return attend(
            cache,
            query,
            key,
            value,
            positions,
            rope=config.rope,
            window=config.window,
            normalizer=normalizer,
            sinks=sinks,
            slots=self._slots,
            position_bias=self._position_bias(alibi=True),
            log_forget=log_forget,
            differential=config.differential,
            **self._call,
        )

    def _gated(self, place: str, subject, x, real) -> Any:
        """The subject through the gate, if it is the one at this place."""
        if self.config.gate == "none" or self.gate.place != place:
            return subject
        scores = self.gate.scores(subject, x, valid=real)
        tap(self, "gate", lambda: self.gate.values(scores))
        return self.gate.apply(subject, scores)


def _real(x, positions, segment_ids) -> Bool[Array, "B T"]:
    """Tokens that are no padding."""
    real = jnp.ones(x.shape[:2], bool)
    if positions is not None:
        real &= positions >= 0
    return real if segment_ids is None else real & (segment_ids != 0)


def _isolation(index: Int[Array, "#B T"], num_sink_tokens: int) -> Bool[Array, "#B 1 T T"]:
    """Sink tokens see themselves only; as large as the logits of one head."""
    query, key = index[:, None, :, None], index[:, None, None, :]
    return (query >= num_sink_tokens) | (query == key)


def _head_norm(x: Float[Array, "B S K H"]) -> Float[Array, "B K S"]:
    norm = jnp.linalg.norm(at_least_float32(jax.lax.stop_gradient(x)), axis=-1)
    return norm.swapaxes(1, 2)
