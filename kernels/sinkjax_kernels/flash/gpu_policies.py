"""The normaliser families as the GPU kernels compute them; `families` has each as an algorithm.

Tiles come as scores: x = ln 2 · unit · score are the logits, so that an exponential is one multiply-add
and one power of two (`Powers`). A hidden pair has the score `hidden`, which gives no weight, adds to no
sum and has no gradient; the kernels write it in where a tile is not full, so no policy knows of masks.
State and denominators are in base 2. What the backward pass calls works on tiles of either orientation.
"""

import dataclasses
import math
import struct
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plt

from sinkjax_kernels import normalizers

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
LOWEST = -1e30
"""Where a running maximum begins. Finite: a score of −inf minus it is −inf, and its exponential 0."""

State = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Powers:
    """2^(unit · score − shift) of a tile, and what is made of it; unit > 0.

    Two instructions for each pair of a query and a key, which bound the speed of a forward pass: left to
    itself the compiler neither fuses the product with the difference, nor drops the care for subnormal
    powers, some six in all; and a quotient of its own has a slow path.
    """

    unit: float
    interpret: bool

    def __call__(self, scores: Array, shift: Array) -> Array:
        if self.interpret:
            return jnp.exp2(scores * self.unit - shift)
        below = jnp.broadcast_to(-shift, scores.shape)
        return _assembly(
            f"fma.rn.ftz.f32 $0, $1, {_literal(self.unit)}, $2; ex2.approx.ftz.f32 $0, $0;",
            scores,
            below,
        )

    def sigmoid(self, scores: Array, shift: float) -> Array:
        """1 / (1 + 2^−(unit · score + shift)): a power that overflows gives 0, as it should."""
        if self.interpret:
            return 1 / (1 + jnp.exp2(-(scores * self.unit) - shift))
        return _assembly(
            f"fma.rn.ftz.f32 $0, $1, {_literal(-self.unit)}, {_literal(-shift)}; "
            f"ex2.approx.ftz.f32 $0, $0; add.rn.ftz.f32 $0, $0, {_literal(1.0)}; "
            "rcp.approx.ftz.f32 $0, $0;",
            scores,
        )


def _literal(x: float) -> str:
    """A float32 as PTX spells it."""
    return "0f" + struct.pack(">f", x).hex()


def _assembly(text: str, *operands: Array) -> Array:
    """PTX on each element of float32 tiles."""
    (result,) = plt.elementwise_inline_asm(
        text,
        args=operands,
        constraints="=f" + ",f" * len(operands),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result


@runtime_checkable
class Policy(Protocol):
    hidden: ClassVar[float]
    has_denominator: ClassVar[bool]
    """Whether the weights of a row depend on each other: it has a denominator, and D = Σ dO · O."""

    def start(self, sinks: Array | None, rows: int) -> State:
        """The state before the first tile; sink logits in base 2."""
        ...

    def absorb(
        self, state: State, scores: Array, power: Powers
    ) -> tuple[State, Array | None, Array]:
        """State, factor of what was summed so far (None is 1), and numerators of the tile."""
        ...

    def finish(self, state: State) -> tuple[Array, Array] | None:
        """Base-2 logarithm of the denominator, and the factor of the output."""
        ...

    def weights(self, scores: Array, power: Powers, denominator: Array | None) -> Array: ...

    def d_logits(
        self,
        scores: Array,
        power: Powers,
        denominator: Array | None,
        weights: Array,
        dw: Array,
        delta: Array | None,
    ) -> Array:
        """Gradient by the logits, from that by the weights and `delta` = D − dL."""
        ...


@dataclasses.dataclass(frozen=True)
class ExpSum:
    """softmax, softmax1, softmax_n, sink logits: the sink is in the running maximum from the start."""

    hidden: ClassVar[float] = -math.inf
    has_denominator: ClassVar[bool] = True

    def start(self, sinks, rows):
        if sinks is None:
            return jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32)
        top = jnp.maximum(sinks, LOWEST)  # a sink of −inf is none
        return top, jnp.exp2(sinks - top)

    def absorb(self, state, scores, power):
        top, total = state
        new = jnp.maximum(top, scores.max(axis=1) * power.unit)
        numerators = power(scores, new[:, None])
        rescale = jnp.exp2(top - new)
        return (new, total * rescale + numerators.sum(axis=1)), rescale, numerators

    def finish(self, state):
        top, total = state
        return top + jnp.log2(total), 1 / total

    def weights(self, scores, power, denominator):
        return power(scores, denominator)

    def d_logits(self, scores, power, denominator, weights, dw, delta):
        return weights * (dw - delta)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """w = 1 / (1 + e^−(x + bias))."""

    bias: float
    hidden: ClassVar[float] = -math.inf
    has_denominator: ClassVar[bool] = False

    def start(self, sinks, rows):
        return ()

    def absorb(self, state, scores, power):
        return state, None, self.weights(scores, power, None)

    def finish(self, state):
        return None

    def weights(self, scores, power, denominator):
        return power.sigmoid(scores, self.bias * LOG2_E)

    def d_logits(self, scores, power, denominator, weights, dw, delta):
        return weights * (1 - weights) * dw


@dataclasses.dataclass(frozen=True)
class Relu:
    """w = relu(x) / divisor."""

    divisor: float
    hidden: ClassVar[float] = -math.inf
    has_denominator: ClassVar[bool] = False

    def start(self, sinks, rows):
        return ()

    def absorb(self, state, scores, power):
        return state, None, self.weights(scores, power, None)

    def finish(self, state):
        return None

    def weights(self, scores, power, denominator):
        return jnp.maximum(scores, 0) * (power.unit * LN_2 / self.divisor)

    def d_logits(self, scores, power, denominator, weights, dw, delta):
        return jnp.where(scores > 0, dw * (1 / self.divisor), 0)


@dataclasses.dataclass(frozen=True)
class Rectified:
    """softpick: relu(E) / (Σ |E| + ε), E = e^x − 1, m = max(0, max x).

    E e^−m is sign(x) · (1 − e^−|x|) · e^(max(x, 0) − m): neither overflow nor cancellation near 0.
    """

    epsilon: float
    hidden: ClassVar[float] = 0.0
    has_denominator: ClassVar[bool] = True

    def start(self, sinks, rows):
        return jnp.zeros((rows,), jnp.float32), jnp.zeros((rows,), jnp.float32)

    def _size(self, scores, power, top):
        """|E| 2^−top."""
        rest = -jnp.expm1(jnp.abs(scores) * -(power.unit * LN_2))
        return power(jnp.maximum(scores, 0), top) * rest

    def absorb(self, state, scores, power):
        top, total = state
        new = jnp.maximum(top, scores.max(axis=1) * power.unit)
        size = self._size(scores, power, new[:, None])
        numerators = jnp.where(scores > 0, size, 0)
        rescale = jnp.exp2(top - new)
        return (new, total * rescale + size.sum(axis=1)), rescale, numerators

    def finish(self, state):
        top, total = state
        total = total + self.epsilon * jnp.exp2(-top)
        safe = jnp.where(total == 0, 1, total)  # ε = 0, and every logit 0
        return top + jnp.log2(safe), jnp.where(total == 0, 0, 1 / safe)

    def weights(self, scores, power, denominator):
        return jnp.where(scores > 0, self._size(scores, power, denominator), 0)

    def d_logits(self, scores, power, denominator, weights, dw, delta):
        slope = power(scores, denominator)
        below = jnp.where(scores < 0, delta, 0)
        return slope * jnp.where(scores > 0, dw - delta, below)


def policy_of(normalizer: normalizers.Normalizer) -> Policy:
    """What computes a normaliser.

    Raises:
        NotImplementedError: nothing does, with what serves it.
    """
    match normalizer:
        case normalizers.Softmax() | normalizers.Softmax1() | normalizers.SoftmaxN():
            return ExpSum()
        case normalizers.Sigmoid(bias=bias, normalized=False):
            return Sigmoid(bias)
        case normalizers.Relu(divisor=divisor, normalized=False, by_length=False):
            return Relu(divisor)
        case normalizers.Softpick(epsilon=epsilon):
            return Rectified(epsilon)
    raise NotImplementedError(
        "normalizer: softmax, softmax1, softmax_n, sigmoid, relu and softpick are built, "
        f"got {normalizer}; `flash.xla` or `flash.rows` serves it"
    )
