"""The frozen description of one attention layer, and what of it does not go together."""

import dataclasses
from typing import get_args

from sinkjax.modules import variant
from sinkjax.modules.variant import LayerVariant
from sinkjax.ops.rope import Rope
from sinkjax_kernels.normalizers import Normalizer, Softmax, Softmax1, SoftmaxN
from sinkjax_kernels.normalizers import resolve as resolve_normalizer

_CHOICES = {
    "kv_bias": variant.KeyValueBias,
    "kv_bias_position": variant.BiasPosition,
    "gate": variant.Gate,
    "gate_activation": variant.GateActivation,
    "alibi": variant.Alibi,
    "norm": variant.Norm,
    "norm_placement": variant.NormPlacement,
    "dtype": variant.DType,
    "param_dtype": variant.DType,
}
_OWN_SLICE = ("conditional_token", "conditional_token_mlp", "conditional_head")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LayerVariant)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(LayerVariant):
    """The shape and the variant of one attention layer.

    Args:
        model_dim: D, width of the residual stream.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H.
        window: W, keys a query sees back, itself included (and forward when not causal); None: all.
        is_causal: no query sees a later key.

    Raises:
        ValueError: names the field, what was expected and what came; a combination without a
            meaning is refused with the reason.
    """

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    is_causal: bool = True

    def __post_init__(self):
        self._check_sizes()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                expected = ", ".join(get_args(choices))
                raise ValueError(f"{name}: expected one of {expected}; got {getattr(self, name)!r}")
        self._check_normalizer()
        self._check_sinks_and_biases()
        self._check_positions()
        self._check_gate()

    def _check_sizes(self):
        for name in ("model_dim", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("num_sinks", "num_kv_biases"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("num_sink_tokens", "distance_bias"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads: expected a multiple of num_kv_heads="
                f"{self.num_kv_heads}, got {self.num_heads}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: expected at least 1 or None, got {self.window}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number with rope_theta={self.rope_theta}, "
                f"got {self.head_dim}"
            )
        for name in ("rope_theta", "scale", "logits_soft_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")

    def _check_normalizer(self):
        described = self.described_normalizer
        if self.learn_normalizer and not described.parameters:
            raise ValueError(
                f"learn_normalizer: expected a normaliser with constants to learn, "
                f"got {self.normalizer!r}"
            )
        if described.needs_causal and not self.is_causal:
            raise ValueError(
                f"normalizer: {self.normalizer!r} goes through the keys in order and needs "
                "is_causal=True"
            )
        if self.share_value and self.gate in ("value", "value_state", "key"):
            raise ValueError(
                f"gate: expected none on keys or values with share_value=True, since one tensor "
                f"is both and the gate would change the other one too; got {self.gate!r}"
            )
        if self.differential and (self.num_heads % 2 or self.num_kv_heads % 2):
            raise ValueError(
                "differential: expected even num_heads and num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )

    def _check_sinks_and_biases(self):
        plain = isinstance(self.described_normalizer, Softmax)
        for name in ("sinks", "token_sinks"):
            if getattr(self, name) and not plain:
                raise ValueError(
                    f"{name}: expected normalizer='softmax' with {name}=True, since a sink logit "
                    f"is a term of its denominator, got {self.normalizer!r}"
                )
        if self.num_sinks > 1 and not self.sinks:
            raise ValueError(f"num_sinks: expected 1 without sinks, got {self.num_sinks}")
        if self.kv_bias in ("key", "key_value", "context") and not plain:
            raise ValueError(
                f"kv_bias: expected normalizer='softmax' with {self.kv_bias!r}, since the learned "
                f"key is a term of its denominator, got {self.normalizer!r}"
            )
        if self.kv_bias != "none" and self.differential:
            raise ValueError(
                "kv_bias: expected 'none' with differential=True, where a value belongs to two "
                f"maps, got {self.kv_bias!r}"
            )
        if self.kv_bias == "none":
            self._needs("kv_bias", "num_kv_biases", "kv_bias_position")
        if self.isolate_sinks and (self.is_causal or self.num_sink_tokens == 0):
            raise ValueError(
                "isolate_sinks: expected a layer that is not causal and has sink tokens, got "
                f"is_causal={self.is_causal}, num_sink_tokens={self.num_sink_tokens}"
            )

    def _check_positions(self):
        shifts = isinstance(self.described_normalizer, Softmax | Softmax1 | SoftmaxN)
        if self.forget_gate and not (self.is_causal and shifts):
            raise ValueError(
                "forget_gate: expected a causal layer with softmax, softmax1 or softmax_n, got "
                f"is_causal={self.is_causal}, normalizer={self.normalizer!r}"
            )
        if self.forget_gate and self.alibi != "none":
            raise ValueError(
                f"alibi: expected 'none' with forget_gate=True, two decays of one logit, "
                f"got {self.alibi!r}"
            )

    def _check_gate(self):
        if self.gate == "none":
            self._needs("gate", "gate_activation", "gate_open", "gate_rescale", "gate_init_std")
            return
        top = 2 if self.gate_activation == "twice_sigmoid" else 1
        if self.gate_open is not None and not 0 < self.gate_open < top:
            raise ValueError(f"gate_open: expected between 0 and {top}, got {self.gate_open}")
        if self.gate_open is not None and self.gate_activation in ("silu", "additive"):
            raise ValueError(
                f"gate_open: expected None with gate_activation={self.gate_activation!r}, which "
                f"has no open fraction, got {self.gate_open}"
            )
        if self.gate_rescale and self.gate_open is None:
            raise ValueError("gate_rescale: expected gate_open to divide by, got None")
        if self.gate_init_std is not None and self.gate_init_std < 0:
            raise ValueError(f"gate_init_std: expected at least 0, got {self.gate_init_std}")
        if self.gate == "conditional_head" and self.is_causal:
            raise ValueError(
                "gate: 'conditional_head' averages over the whole text, later tokens included, "
                "and needs is_causal=False"
            )
        if self.gate in _OWN_SLICE and self.model_dim % self.num_heads:
            raise ValueError(
                f"model_dim: expected a multiple of num_heads={self.num_heads} with "
                f"gate={self.gate!r}, which gives each head its slice, got {self.model_dim}"
            )

    def _needs(self, owner: str, *names: str) -> None:
        """Fields that mean nothing without `owner` must be left alone."""
        for name in names:
            if getattr(self, name) != _DEFAULTS[name]:
                raise ValueError(
                    f"{name}: expected {_DEFAULTS[name]} with {owner}='none', "
                    f"got {getattr(self, name)!r}"
                )

    @property
    def described_normalizer(self) -> Normalizer:
        """The normaliser as a description."""
        return resolve_normalizer(self.normalizer)

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
