"""The metrics that `analyze` can measure: names, definitions, and what reduces each to numbers.

Formulas are in `sinkjax.ops.statistics`; here they are applied to what a decoder returns and
averaged over samples. Everything in this file runs inside one jitted function.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sinkjax.diagnose.capture import Capture, run
from sinkjax.ops import statistics as formulas

Entries = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What has to be named beside a sink number, or it cannot be compared.

    Args:
        epsilon: threshold of the sink rate on the importance alpha.
        sink_tokens: T of importance and sink rate: they are measured on the first T tokens.
        position: index of the token that is examined as a sink.
    Raises:
        ValueError: names the field, what was expected and what came.
    """

    epsilon: float = 0.3
    sink_tokens: int = 64
    position: int = 0

    def __post_init__(self):
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon: expected a share in [0, 1], got {self.epsilon}")
        if self.sink_tokens < 2:
            raise ValueError(f"sink_tokens: expected at least 2, got {self.sink_tokens}")
        if self.position < 0:
            raise ValueError(f"position: expected at least 0, got {self.position}")


class Observation:
    """One call of a model on [B, T] tokens, seen as lazily as tracing allows."""

    def __init__(self, model: Any, tokens: Array, settings: Settings):
        self.model, self.tokens, self.settings = model, tokens, settings

    @cached_property
    def capture(self) -> Capture:
        """Dense states; only for a model that `capturable` returned."""
        return run(self.model, self.tokens)

    @cached_property
    def statistics(self) -> dict[str, Array]:
        """`Output.statistics` over all tokens."""
        return self.model(self.tokens, statistics=True).statistics

    @cached_property
    def short(self) -> dict[str, Array]:
        """`Output.statistics` over the first `sink_tokens` tokens."""
        if self.tokens.shape[1] <= self.settings.sink_tokens:
            return self.statistics
        return self.model(self.tokens[:, : self.settings.sink_tokens], statistics=True).statistics


def _importance(seen: Observation) -> Entries:
    found, k = seen.short, seen.settings.position
    raw = formulas.importance(found["key_mass"], found["key_count"])
    normalized = formulas.importance(found["key_mass_normalized"], found["key_count"])
    length = raw.shape[-1]
    return {
        "importance": raw[..., k].mean(axis=1),
        "importance_normalized": normalized[..., k].mean(axis=1),
        "importance_by_position": raw.mean(axis=(1, 2)),
        "uniform_importance": jnp.asarray(formulas.uniform_importance(length, k)),
    }


def _sink_rate(seen: Observation) -> Entries:
    found, options = seen.short, seen.settings
    count = found["key_count"]
    both = {"": found["key_mass"], "_normalized": found["key_mass_normalized"]}
    result: Entries = {}
    for suffix, mass in both.items():
        by_head = formulas.sink_rate_by_head(mass, count, options.epsilon, options.position)
        result[f"sink_rate{suffix}"] = by_head.mean()
        result[f"sink_rate{suffix}_by_head"] = by_head
        result[f"sink_rate{suffix}_mean_first"] = formulas.sink_rate(
            mass, count, options.epsilon, options.position, order="mean_first"
        )
    return result


def _first_token_share(seen: Observation) -> Entries:
    by_layer = formulas.first_token_share_by_layer(
        seen.statistics["key_mass"], seen.statistics["key_count"], seen.settings.position
    )
    return {"first_token_share": by_layer.mean(), "first_token_share_by_layer": by_layer}


def _row_mass(seen: Observation) -> Entries:
    found = seen.statistics
    return {
        "row_mass": found["row_mass"].mean(axis=(1, 3)),
        "sink_mass": found["sink_mass"].mean(axis=(1, 3)),
    }


def _entropy(seen: Observation) -> Entries:
    by_head = formulas.entropy_by_head(seen.statistics["entropy"])
    return {"entropy": by_head.mean(), "entropy_by_head": by_head}


def _max_logit(seen: Observation) -> Entries:
    return {"max_logit": seen.statistics["max_logit"].max(axis=(1, 3))}


def _norms(seen: Observation) -> Entries:
    found, k = seen.statistics, seen.settings.position
    residual = found["residual_norm"].mean(axis=1)  # [L, 2, T]
    return {
        "value_drain": formulas.value_norm_drain(found["value_norm"], position=k),
        "value_drain_per_sample": formulas.value_norm_drain(
            found["value_norm"], order="per_sample", position=k
        ),
        "key_norm_ratio": formulas.key_norm_ratio(found["key_norm"], position=k),
        "residual_peak": formulas.residual_peak(found["residual_norm"], position=k),
        "value_norm": _first_and_others(found["value_norm"].mean(axis=(1, 2)), k),
        "key_norm": _first_and_others(found["key_norm"].mean(axis=(1, 2)), k),
        "residual_norm": _first_and_others(residual, k),
    }


def _first_and_others(norm: Array, position: int) -> Array:
    others = (norm.sum(axis=-1) - norm[..., position]) / (norm.shape[-1] - 1)
    return jnp.stack([norm[..., position], others], axis=-1)


def _massive_activations(seen: Observation) -> Entries:
    top, median = seen.statistics["residual_top"], seen.statistics["residual_median"]
    largest = top[..., 0].mean(axis=1)  # [L, 2]
    return {
        "activation_top": top.mean(axis=1),
        "activation_median": median.mean(axis=1),
        "activation_psi": formulas.psi(top, median).mean(axis=1),
        "activation_spikes": formulas.is_spike(top, median).mean(axis=1, dtype=top.dtype),
        "max_inf_norm": largest.max(),
        "m_act": largest[:, 1].mean(),
    }


def _kurtosis(seen: Observation) -> Entries:
    states = seen.capture
    halves = states.residual
    bondarenko = formulas.kurtosis_bondarenko(halves).mean(axis=-1)  # [L, 2]
    layers = jnp.concatenate([states.embedding[None], states.residual_mlp])
    osp = formulas.kurtosis_osp(layers).mean(axis=-1)  # [L + 1]
    return {
        "kurtosis_bondarenko": bondarenko,
        "kurtosis_bondarenko_mean": bondarenko.mean(),
        "kurtosis_bondarenko_max": bondarenko.max(),
        "kurtosis_osp": osp.mean(),
        "kurtosis_osp_by_layer": osp,
        "kurtosis_pooled": formulas.kurtosis_pooled(states.residual_mlp),
    }


def _geometry(seen: Observation) -> Entries:
    hidden = seen.capture.residual_mlp
    return {
        "matrix_entropy": formulas.matrix_entropy(hidden).mean(axis=-1),
        "anisotropy": formulas.anisotropy(hidden).mean(axis=-1),
    }


def _key_cosines(seen: Observation) -> Entries:
    states, k = seen.capture, seen.settings.position
    before = formulas.key_cosines(states.query, states.key, k)
    after = formulas.key_cosines(states.query_rotated, states.key_rotated, k)
    return {
        "key_cosine_sink": after[0].mean(axis=1),
        "key_cosine_others": after[1].mean(axis=1),
        "key_cosine_sink_before_rope": before[0].mean(axis=1),
        "key_cosine_others_before_rope": before[1].mean(axis=1),
    }


def _gates(seen: Observation) -> Entries:
    states = seen.capture
    result = {"dead_heads": formulas.dead_heads(states.attention_out).astype(jnp.float32)}
    if states.gate is not None:
        axes = tuple(range(1, states.gate.ndim))
        found = formulas.gate_statistics(states.gate)
        result["gate_mean"] = found["mean"]
        result["gate_zero_fraction"] = found["zero_fraction"]
        result["gate_mean_by_layer"] = states.gate.mean(axis=axes)
    return result


@dataclasses.dataclass(frozen=True)
class Metric:
    """One name that `analyze` takes.

    Args:
        measure: reduces an observation to named entries.
        dense: whether it needs captured states (memory in T^2 and L B T D) or statistics only.
    """

    measure: Callable[[Observation], Entries]
    dense: bool = False


METRICS: dict[str, Metric] = {
    "sink_rate": Metric(_sink_rate),
    "importance": Metric(_importance),
    "first_token_share": Metric(_first_token_share),
    "row_mass": Metric(_row_mass),
    "entropy": Metric(_entropy),
    "max_logit": Metric(_max_logit),
    "norms": Metric(_norms),
    "massive_activations": Metric(_massive_activations),
    "kurtosis": Metric(_kurtosis, dense=True),
    "geometry": Metric(_geometry, dense=True),
    "key_cosines": Metric(_key_cosines, dense=True),
    "gates": Metric(_gates, dense=True),
}

# Entry -> axes, definition. L layers, N query heads, S keys, half = (after attention, after MLP),
# who = (examined token, mean of the others), rank = largest first, L+1 = embedding and layers.
ENTRIES: Mapping[str, tuple[str, str]] = {
    "sink_rate": ("", "share of heads and samples with α > ε, raw weights"),
    "sink_rate_by_head": ("L N", "share of samples with α > ε, raw weights"),
    "sink_rate_mean_first": ("", "share of heads whose mean α over samples is > ε, raw weights"),
    "sink_rate_normalized": ("", "share of heads and samples with α > ε, row-normalised weights"),
    "sink_rate_normalized_by_head": ("L N", "share of samples with α > ε, row-normalised weights"),
    "sink_rate_normalized_mean_first": (
        "",
        "share of heads whose mean α over samples is > ε, row-normalised weights",
    ),
    "importance": ("L N", "α: mean weight on the token from queries that see it"),
    "importance_normalized": ("L N", "α of row-normalised weights"),
    "importance_by_position": ("L S", "α of each key, mean over heads and samples"),
    "uniform_importance": ("", "α of uniform causal attention"),
    "first_token_share": ("", "mean weight on the token over all queries, heads, layers (F-Attn)"),
    "first_token_share_by_layer": ("L", "mean weight on the token over all queries and heads"),
    "row_mass": ("L N", "mean sum of a row's weights on real tokens"),
    "sink_mass": ("L N", "mean weight on the sink logit"),
    "entropy": ("", "mean attention entropy, nats, rows normalised"),
    "entropy_by_head": ("L N", "mean attention entropy, nats, rows normalised"),
    "max_logit": ("L N", "largest attention logit"),
    "value_drain": ("L", "value norm of the token over the others', ratio of means"),
    "value_drain_per_sample": ("L", "value norm of the token over the others', mean of ratios"),
    "key_norm_ratio": ("L", "key norm (after RoPE) of the token over the others'"),
    "residual_peak": ("L half", "residual norm of the token over the others'"),
    "value_norm": ("L who", "L2 norm of values"),
    "key_norm": ("L who", "L2 norm of keys after RoPE"),
    "residual_norm": ("L half who", "L2 norm of the residual stream"),
    "activation_top": ("L half rank", "three largest |x| of the residual stream, mean of samples"),
    "activation_median": ("L half", "median |x| of the residual stream, mean of samples"),
    "activation_psi": ("L half", "Ψ: largest over median |x|, mean of samples"),
    "activation_spikes": ("L half", "share of samples with Ψ ≥ 1000 and largest |x| ≥ 100"),
    "max_inf_norm": ("", "largest over half-blocks of the mean over samples of max |x|"),
    "m_act": ("", "mean over layers of the largest |x| of a layer's output (M-Act)"),
    "kurtosis_bondarenko": ("L half", "kurtosis over (T, D) per sample; Gaussian 3"),
    "kurtosis_bondarenko_mean": ("", "kurtosis over (T, D) per sample, mean of half-blocks"),
    "kurtosis_bondarenko_max": ("", "kurtosis over (T, D) per sample, largest half-block"),
    "kurtosis_osp": ("", "excess kurtosis per token, uncentred, rectified; Gaussian 0"),
    "kurtosis_osp_by_layer": ("L+1", "excess kurtosis per token, uncentred, rectified"),
    "kurtosis_pooled": ("", "kurtosis of all layer outputs pooled (not excess); Gaussian 3"),
    "matrix_entropy": ("L", "entropy of the spectrum of the layer output, nats"),
    "anisotropy": ("L", "share of the largest singular direction of the layer output"),
    "key_cosine_sink": ("L N", "cosine of later queries with the token's key, after RoPE"),
    "key_cosine_others": ("L N", "cosine of queries with the other keys, after RoPE"),
    "key_cosine_sink_before_rope": ("L N", "cosine with the token's key, before RoPE"),
    "key_cosine_others_before_rope": ("L N", "cosine with the other keys, before RoPE"),
    "dead_heads": ("L N", "1 where a head's output is < 1e-6 at ≥ 95 % of tokens"),
    "gate_mean": ("", "mean gate value"),
    "gate_zero_fraction": ("", "fraction of gate values that are exactly 0"),
    "gate_mean_by_layer": ("L", "mean gate value"),
}
