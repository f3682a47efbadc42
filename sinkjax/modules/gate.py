"""A gate as a module: which one, and how open it starts, is chosen by the config of its layer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

from sinkjax.modules.attention_config import AttentionConfig
from sinkjax.modules.projection import contract
from sinkjax.ops.gates import apply_gate, gate_score, gate_value
from sinkjax.ops.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a gate multiplies, and the einsum of its scores: the input, the kernel, the scores.

    Letters beside the usual ones: I is D/N, a head's slice of the input; M is I/4, the width of the
    two-layer gate; J is H and O is D again, for what goes out.
    """

    place: str
    equation: str

    @property
    def letters(self) -> tuple[str, str, str]:
        operands, result = self.equation.split("->")
        x, kernel = operands.split(",")
        return x, kernel, result


_KINDS = {
    "elementwise": _Kind("attention", "BTD,DNH->BTNH"),
    "headwise": _Kind("attention", "BTD,DN->BTN"),
    "shared": _Kind("attention", "BTD,DH->BTH"),
    "query": _Kind("query", "BTD,DNH->BTNH"),
    "key": _Kind("key", "BTD,DKH->BTKH"),
    "value": _Kind("value", "BTD,DKH->BTKH"),
    "value_state": _Kind("value", "BTKH,KHJ->BTKJ"),
    "output": _Kind("output", "BTD,DO->BTO"),
    "conditional_token": _Kind("attention", "BTNI,NI->BTN"),
    "conditional_token_mlp": _Kind("attention", "BTNM,NM->BTN"),
    "conditional_head": _Kind("attention", "BTNI,NI->BTN"),
    "unconditional_head": _Kind("attention", "BT,->BTN"),  # no kernel: never contracted
}


class Gate(nnx.Module):
    """One gate of an attention layer.

    y = subject * activation(scores(x)) / (gate_open if gate_rescale else 1);  additive: y = subject
    + sigmoid(scores(x))

    ``subject`` is what stands at `place`; ``x`` [B, T, D] is the layer's input, after its norm.

    ========================= ========= =============================================== ==========
    config.gate               place     scores                                          kernel
    ========================= ========= =============================================== ==========
    ``elementwise``           attention [B, T, N, H] x W                                [D, N, H]
    ``headwise``              attention [B, T, N] x W                                   [D, N]
    ``shared``                attention [B, T, H] x W, for all heads                    [D, H]
    ``query``                 query     [B, T, N, H] x W                                [D, N, H]
    ``key``, ``value``        the same  [B, T, K, H] x W                                [D, K, H]
    ``value_state``           value     [B, T, K, H] v W, from the value itself         [K, H, H]
    ``output``                output    [B, T, D] x W, after the output projection      [D, D]
    ``conditional_token``     attention [B, T, N] x_n · w_n, x_n a head's slice of x    [N, D/N]
    ``conditional_token_mlp`` attention [B, T, N] relu(x_n U_n + u_n) · w_n             [N, M]
    ``conditional_head``      attention [B, T, N] mean over the text of x_n, · w_n      [N, D/N]
    ``unconditional_head``    attention [B, T, N] the bias                              none
    ========================= ========= =============================================== ==========

    Parameters: ``kernel``; ``bias``, of the shape of the scores without B and T, with
    ``config.gate_open`` and for ``unconditional_head``; ``hidden`` [N, D/N, M] and ``hidden_bias``
    [N, M], M = D/N/4, for the two-layer gate. Biases are float32 at least. The kernel starts at
    N(0, gate_init_std), the bias where the gate is ``gate_open``.

    Attributes:
        place: what it multiplies: ``query``, ``key``, ``value``, ``attention`` or ``output``.

    Args:
        config: of the layer.
        rngs: source of the initial parameters.

    Raises:
        ValueError: the config asks for no gate.

    Source: element-wise, head-wise, shared, query, key, value, output Qiu et al., arXiv 2505.06708,
        section 2.2; value-state Bu et al., arXiv 2510.09017; conditional and unconditional
        Bondarenko et al., arXiv 2306.12929, with the width and the ReLU of its code
        (whose all-heads linear gate is ``headwise`` with gate_open).
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        if config.gate == "none":
            raise ValueError(f"gate: expected one of {', '.join(_KINDS)}; got 'none'")
        self.config = config
        self.place = _KINDS[config.gate].place
        D, N, K, H = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim
        _, kernel, result = _KINDS[config.gate].letters
        sizes = dict(D=D, N=N, K=K, H=H, I=D // N, J=H, M=max(1, D // N // 4), O=D)

        def normal(letters: str, std: float) -> nnx.Param:
            shape = tuple(sizes[letter] for letter in letters)
            draw = jax.random.normal(rngs.params(), shape, jnp.dtype(config.param_dtype))
            return nnx.Param(draw * jnp.asarray(std, draw.dtype))

        float_type = jnp.promote_types(config.param_dtype, jnp.float32)
        if config.gate == "conditional_token_mlp":
            # Never zero: with a zero kernel behind it, neither layer would get a gradient.
            self.hidden = normal("NIM", config.init_std)
            self.hidden_bias = nnx.Param(jnp.zeros((N, sizes["M"]), float_type))
        if kernel:
            std = config.init_std if config.gate_init_std is None else config.gate_init_std
            self.kernel = normal(kernel, std)
        start = 0.0
        if config.gate_open is not None:
            start = gate_score(config.gate_open, config.gate_activation)
        if config.gate_open is not None or not kernel:
            shape = tuple(sizes[letter] for letter in result[2:])
            self.bias = nnx.Param(jnp.full(shape, start, float_type))

    def __call__(
        self,
        subject: Float[Array, "..."],
        x: Float[Array, "B T D"],
        *,
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "..."]:
        """``subject`` through the gate: `apply` after `scores`."""
        return self.apply(subject, self.scores(subject, x, valid=valid))

    def scores(
        self,
        subject: Float[Array, "..."],
        x: Float[Array, "B T D"],
        *,
        valid: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T ..."]:
        """How open, before the activation.

        Args:
            subject: what will be gated; only ``value_state`` looks at it.
            x: [B, T, D], the layer's input.
            valid: [B, T], False at padding, which ``conditional_head`` leaves out of its mean.

        Returns:
            [B, T, ...] as in the table of the class.
        """
        config, kind = self.config, _KINDS[self.config.gate]
        if config.gate == "unconditional_head":
            return jnp.broadcast_to(self.bias[...], (*x.shape[:2], config.num_heads))
        if config.gate == "value_state":
            x = subject
        elif config.gate.startswith("conditional"):
            x = x.reshape(*x.shape[:2], config.num_heads, -1)
        if config.gate == "conditional_token_mlp":
            hidden = self._contract("BTNI,NIM->BTNM", x, self.hidden[...])
            x = jax.nn.relu(at_least_float32(hidden) + self.hidden_bias[...])
        elif config.gate == "conditional_head":
            x = _mean(x, valid)
        scores = self._contract(kind.equation, x, self.kernel[...])
        layout = jax.typeof(x).sharding
        if config.gate in ("shared", "output") and AxisType.Explicit in layout.mesh.axis_types:
            # The mesh axis of the kernel's last dimension is taken by the heads of the subject, and
            # the residual stream is whole along D.
            scores = jax.sharding.reshard(scores, PartitionSpec(*layout.spec[:2], None))
        if config.gate_open is not None:
            scores = at_least_float32(scores) + self.bias[...]
        if config.gate == "conditional_head":
            scores = jnp.broadcast_to(scores, (*subject.shape[:2], config.num_heads))
        return scores

    def values(self, scores: Float[Array, "..."]) -> Float[Array, "..."]:
        """What the gate multiplies by at these scores, float32 at least; for taps and metrics."""
        return gate_value(scores, self.config.gate_activation)

    def apply(
        self, subject: Float[Array, "..."], scores: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """``subject`` through a gate with these scores, in the type of ``subject``."""
        config, result = self.config, _KINDS[self.config.gate].letters[2]
        if result == "BTN":
            scores = scores[..., None]
        elif result == "BTH":
            scores = scores[:, :, None]
        divisor = 1.0
        if config.gate_rescale and config.gate_open is not None:
            divisor = config.gate_open
        return apply_gate(subject, scores, config.gate_activation, divisor=divisor)

    def _contract(self, equation: str, x: Array, kernel: Array) -> Array:
        dtype = self.config.dtype
        return contract(equation, x.astype(dtype), kernel.astype(dtype))


def _mean(x: Float[Array, "B T N I"], valid: Bool[Array, "B T"] | None) -> Float[Array, "B 1 N I"]:
    """Mean over the real tokens of a row; 0 for a row that is all padding."""
    x = at_least_float32(x)
    if valid is None:
        return jnp.mean(x, axis=1, keepdims=True)
    count = jnp.sum(valid, axis=1)[:, None, None, None]
    total = jnp.sum(jnp.where(valid[..., None, None], x, 0), axis=1, keepdims=True)
    return total / jnp.maximum(count, 1)
