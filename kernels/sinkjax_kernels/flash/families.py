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
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

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
class SigmoidFamily:
    """w = sigmoid(x + b): nothing to carry from tile to tile, partial results simply add."""

    bias: float

    def start(self, sinks, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def absorb(self, state, logits, where):
        return state, jnp.ones_like(state[0]), self.weights(logits, where, state[0])

    def finish(self, state):
        return state[0], jnp.ones_like(state[0])

    def weights(self, logits, where, denominator):
        return jnp.where(where, jax.nn.sigmoid(logits + self.bias), 0)

    def d_logits(self, logits, where, denominator, weights, dw, delta):
        return weights * (1 - weights) * dw


@dataclasses.dataclass(frozen=True)
class Rectified:
    """softpick: numerators relu(E), denominator sum |E| + epsilon, E = e^x − 1, m = max(0, max x)."""

    epsilon: float

    def start(self, sinks, shape, dtype):
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def absorb(self, state, logits, where):
        top, total = state
        new = jnp.maximum(top, jnp.max(logits, axis=-1, where=where, initial=0.0))
        excess = normalizers.signed_excess(jnp.where(where, logits, 0), new[..., None])
        rescale = jnp.exp(top - new)
        total = rescale * total + jnp.abs(excess).sum(-1)
        return (new, total), rescale, jax.nn.relu(excess)

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
        return slope * (jnp.where(logits > 0, dw, 0) - jnp.sign(logits) * delta[..., None])


def family_of(normalizer: normalizers.Normalizer) -> Family:
    """The online algorithm of a normaliser; NotImplementedError where it has none."""
    match normalizer:
        case normalizers.Sigmoid(bias=bias):
            return SigmoidFamily(bias)
        case normalizers.Softpick(epsilon=epsilon):
            return Rectified(epsilon)
        case normalizers.Softmax() | normalizers.Softmax1() | normalizers.SoftmaxN():
            return ExpSum()
    raise NotImplementedError(f"no blockwise algorithm for normalizer {normalizer}")
