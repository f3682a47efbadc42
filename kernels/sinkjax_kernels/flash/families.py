"""The normaliser families as online algorithms: what a blockwise kernel needs to know of each.

A kernel visits tiles of logits X with visibility M, row by row block, in any order:

    state = family.start(sinks, rows)
    state, rescale, numerators = family.absorb(state, X, M)     # acc = rescale * acc + numerators @ V
    denominator, inverse = family.finish(state)                 # out = inverse * acc

and in the backward pass, with D = sum(dO * O) and the cotangent dL of the log-sum-exp,

    P  = family.weights(X, M, denominator)                      # dV = P' dO
    dX = family.d_logits(X, M, denominator, P, dP, D - dL)      # dP = dO V'

`denominator` is kept as a logarithm: for exp-sum it is the log-sum-exp with the sink term included.
Formulas: checked against float64 autodiff by the conformance suite.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax_kernels import normalizers

Rows = tuple[Array, Array]  # running maximum and running sum, one of each per row


@runtime_checkable
class Family(Protocol):
    def start(self, sinks: Array | None, shape: tuple[int, ...], dtype) -> Rows: ...
    def absorb(self, state: Rows, logits: Array, where: Array) -> tuple[Rows, Array, Array]: ...
    def finish(self, state: Rows) -> tuple[Array, Array]: ...
    def weights(self, logits: Array, where: Array, denominator: Array) -> Array: ...
    def d_logits(
        self,
        logits: Array,
        where: Array,
        denominator: Array,
        weights: Array,
        dw: Array,
        delta: Array,
    ) -> Array: ...


@dataclasses.dataclass(frozen=True)
class ExpSum:
    """softmax, softmax1, softmax_n, sink logits: the sink is one more term of the sum, without a value.

    Starting with m = s, l = 1 puts it into the running maximum, so that exp(s − m) cannot overflow.
    """

    def start(self, sinks, shape, dtype):
        if sinks is None:
            return jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
        return jnp.broadcast_to(sinks.astype(dtype), shape), jnp.ones(shape, dtype)

    def absorb(self, state, logits, where):
        top, total = state
        new = jnp.maximum(top, jnp.max(logits, axis=-1, where=where, initial=-jnp.inf))
        safe = jnp.where(new == -jnp.inf, 0, new)
        numerators = jnp.where(where, jnp.exp(logits - safe[..., None]), 0)
        rescale = jnp.exp(top - safe)
        return (new, rescale * total + numerators.sum(-1)), rescale, numerators

    def finish(self, state):
        top, total = state
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        return jnp.where(empty, -jnp.inf, top + jnp.log(safe)), jnp.where(empty, 0, 1 / safe)

    def weights(self, logits, where, denominator):
        safe = jnp.where(denominator == -jnp.inf, 0, denominator)
        return jnp.where(where, jnp.exp(logits - safe[..., None]), 0)

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        return weights * (dw - delta[..., None])


@dataclasses.dataclass(frozen=True)
class SigExpSum(ExpSum):
    """sigsoftmax: z = 2x − softplus(x) in front, with slope 1 + sigmoid(−x)."""

    def _mapped(self, logits):
        return normalizers.exponent(normalizers.SigSoftmax(), logits)

    def absorb(self, state, logits, where):
        return super().absorb(state, self._mapped(logits), where)

    def weights(self, logits, where, denominator):
        return super().weights(self._mapped(logits), where, denominator)

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        slope = 1 + jax.nn.sigmoid(-logits)
        return slope * super().d_logits(logits, where, denominator, weights, dw, delta)


@dataclasses.dataclass(frozen=True)
class SignedExpSum(ExpSum):
    """cog: softmax of |x|, each weight with the sign of its logit."""

    def absorb(self, state, logits, where):
        state, rescale, numerators = super().absorb(state, jnp.abs(logits), where)
        return state, rescale, jnp.sign(logits) * numerators

    def weights(self, logits, where, denominator):
        return jnp.sign(logits) * super().weights(jnp.abs(logits), where, denominator)

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        sign = jnp.sign(logits)
        return weights * (sign * dw - delta[..., None])


@dataclasses.dataclass(frozen=True)
class ExpSumFromZero(ExpSum):
    """rectified_only: negative logits are as good as masked."""

    def absorb(self, state, logits, where):
        return super().absorb(state, logits, where & (logits >= 0))

    def weights(self, logits, where, denominator):
        return super().weights(logits, where & (logits >= 0), denominator)


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """w = f(x): nothing to carry from tile to tile, partial results simply add."""

    def value(self, logits: Array) -> Array:
        raise NotImplementedError

    def slope(self, logits: Array, weights: Array) -> Array:
        """f'(x), from x and the weights f(x)."""
        raise NotImplementedError

    def start(self, sinks, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def absorb(self, state, logits, where):
        return state, jnp.ones_like(state[0]), self.weights(logits, where, state[0])

    def finish(self, state):
        return state[0], jnp.ones_like(state[0])

    def weights(self, logits, where, denominator):
        return jnp.where(where, self.value(logits), 0)

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        return self.slope(logits, weights) * dw


@dataclasses.dataclass(frozen=True)
class SigmoidFamily(Elementwise):
    """w = sigmoid(x + b)."""

    bias: float

    def value(self, logits):
        return jax.nn.sigmoid(logits + self.bias)

    def slope(self, logits, weights):
        return weights * (1 - weights)


@dataclasses.dataclass(frozen=True)
class ReluFamily(Elementwise):
    """w = relu(x) / d."""

    divisor: float

    def value(self, logits):
        return jax.nn.relu(logits) / self.divisor

    def slope(self, logits, weights):
        return (logits > 0) / self.divisor


@dataclasses.dataclass(frozen=True)
class IdentityFamily(Elementwise):
    """w = x: identity, and elu on mapped queries and keys."""

    def value(self, logits):
        return logits

    def slope(self, logits, weights):
        return jnp.ones_like(logits)


@dataclasses.dataclass(frozen=True)
class ConSmaxFamily(Elementwise):
    """w = e^(x − shift) / divisor, which stops growing where the specification does."""

    shift: float
    divisor: float

    def value(self, logits):
        exponent = jnp.minimum(logits - self.shift, normalizers.LARGEST_EXPONENT)
        return jnp.exp(exponent) / self.divisor

    def slope(self, logits, weights):
        return jnp.where(logits - self.shift < normalizers.LARGEST_EXPONENT, weights, 0)


@dataclasses.dataclass(frozen=True)
class Rectified:
    """softpick: numerators relu(E), denominator sum |E| + epsilon, E = e^x − 1, m = max(0, max x).

    relu_softmax (`counts_negative` False): denominator sum relu(E) + epsilon.
    """

    epsilon: float
    counts_negative: bool = True

    def start(self, sinks, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def absorb(self, state, logits, where):
        top, total = state
        new = jnp.maximum(top, jnp.max(logits, axis=-1, where=where, initial=0.0))
        excess = normalizers.signed_excess(jnp.where(where, logits, 0), new[..., None])
        rescale = jnp.exp(top - new)
        positive = jax.nn.relu(excess)
        counted = jnp.abs(excess) if self.counts_negative else positive
        return (new, rescale * total + counted.sum(-1)), rescale, positive

    def finish(self, state):
        top, total = state
        total = total + self.epsilon * jnp.exp(-top)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        return top + jnp.log(safe), jnp.where(empty, 0, 1 / safe)

    def weights(self, logits, where, denominator):
        return jax.nn.relu(
            normalizers.signed_excess(jnp.where(where, logits, 0), denominator[..., None])
        )

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        slope = jnp.where(where, jnp.exp(jnp.where(where, logits, 0) - denominator[..., None]), 0)
        sign = jnp.sign(logits) if self.counts_negative else (logits > 0)
        return slope * (jnp.where(logits > 0, dw, 0) - sign * delta[..., None])


def family_of(normalizer: normalizers.Normalizer) -> Family:
    """The online algorithm of a normaliser.

    Raises:
        NotImplementedError: it has none, with the reason; `flash.rows` serves it.
    """
    match normalizer:
        case normalizers.Softmax() | normalizers.Softmax1() | normalizers.SoftmaxN():
            return ExpSum()
        case normalizers.SigSoftmax():
            return SigExpSum()
        case normalizers.Cog():
            return SignedExpSum()
        case normalizers.RectifiedOnly():
            return ExpSumFromZero()
        case normalizers.Softpick(epsilon=epsilon):
            return Rectified(epsilon)
        case normalizers.ReluSoftmax(epsilon=epsilon):
            return Rectified(epsilon, counts_negative=False)
        case normalizers.Sigmoid(bias=bias, normalized=False):
            return SigmoidFamily(bias)
        case normalizers.Relu(divisor=divisor, normalized=False, by_length=False):
            return ReluFamily(divisor)
        case normalizers.Identity(normalized=False) | normalizers.Elu(normalized=False):
            return IdentityFamily()
        case normalizers.ConSmax(shift=shift, divisor=divisor):
            return ConSmaxFamily(shift, divisor)
    reason = {
        "two_pass": "a number of the whole row comes before its first weight",
        "sparse": "its threshold depends on the whole row",
        "ordered": "its weights depend on the order of the keys",
    }.get(normalizer.family, "its sum is taken over the whole row")
    raise NotImplementedError(f"no blockwise algorithm for normalizer {normalizer}: {reason}")


def fold_params(
    normalizer: normalizers.Normalizer,
    params: Mapping[str, Float[Array, " N"]],
    bias: Float[Array, "#B #N #T #S"] | None,
) -> tuple[Float[Array, "#B #N #T #S"] | None, Float[Array, " N 1"] | None]:
    """Learned leaves as what tiles know already: a bias on the logits, and a factor on the output.

    Their gradients are those of the bias and of the factor.
    """
    shift, factor = None, None
    match normalizer:
        case normalizers.Sigmoid():
            shift = params.get("bias")
        case normalizers.ConSmax(divisor=divisor):
            shift = -params["shift"] if "shift" in params else None
            if "divisor" in params:
                factor = (divisor / (divisor + params["divisor"]))[:, None]
    if shift is None:
        return bias, factor
    shift = shift[None, :, None, None]
    return (shift if bias is None else bias + shift), factor
