"""What the TPU kernels know of a normaliser: one policy per family.

Scores come out of the matmul as logits times `base`, so that no tile is scaled once more. A forward
kernel has all scores of a row before it weighs one (or, in its loop, those of a chunk):

    top = max(policy.start(sink), scores)                     # where `has_top`
    numerators, counted = policy.terms(scores, top)           # out = numerators @ V / denominator
    denominator = policy.denominator(sum(counted), top, sink) # where `has_top`

and the backward kernel recomputes weights from the logarithm of the denominator in base 2:

    weights, slopes = policy.slopes(scores, log_denominator)  # hidden pairs are set to 0 in both
    d_logits = policy.d_logits(slopes, scores, d_weights, delta)

These are the formulas of `flash.families` in base 2; `hidden` is the score of an invisible pair.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import normalizers

LOG2_E = math.log2(math.e)
MASKED = -0.7 * float(np.finfo(np.float32).max)  # not −inf: −inf − −inf would be NaN

TINY = 1e-30  # of a denominator that is nothing: the numerators are 0 then


@dataclasses.dataclass(frozen=True)
class ExpSum:
    """softmax, softmax1, softmax_n, sink logits."""

    base = LOG2_E
    hidden = MASKED
    has_top = True  # a running maximum, and a denominator
    counts_numerators = True  # what is summed is what multiplies the values
    is_smooth = True  # the slope of a weight does not jump

    def start(self, sink):
        """What the maximum begins with, in the unit of the scores; None is nothing."""
        return sink

    def terms(self, score, top):
        term = jnp.exp2(score - top)
        return term, term

    def denominator(self, total, top, sink):
        return total if sink is None else total + jnp.exp2(sink - top)

    def slopes(self, score, log_denominator):
        weight = jnp.exp2(score - log_denominator)
        return weight, weight

    def d_logits(self, slope, score, d_weight, delta):
        return slope * (d_weight - delta)


@dataclasses.dataclass(frozen=True)
class Rectified:
    """softpick, relu_softmax: E = e^x − 1 over the sum of |E| or relu(E), the maximum from 0 on.

    e^−m (e^x − 1) is tanh(x/2) (e^(x − m) + e^−m): no digits are lost near x = 0.
    """

    epsilon: float
    counts_negative: bool = True

    base = LOG2_E
    hidden = 0.0  # e^0 − 1 counts nothing
    has_top = True
    counts_numerators = False
    is_smooth = False

    def start(self, sink):
        return 0.0

    def _excess(self, score, top):
        half = jnp.tanh(score * (0.5 / LOG2_E))
        return half * (jnp.exp2(score - top) + jnp.exp2(-top))

    def terms(self, score, top):
        excess = self._excess(score, top)
        positive = jnp.maximum(excess, 0)
        return positive, jnp.abs(excess) if self.counts_negative else positive

    def denominator(self, total, top, sink):
        return jnp.maximum(total + self.epsilon * jnp.exp2(-top), TINY)

    def slopes(self, score, log_denominator):
        weight = jnp.maximum(self._excess(score, log_denominator), 0)
        return weight, jnp.exp2(score - log_denominator)

    def d_logits(self, slope, score, d_weight, delta):
        positive = score > 0
        below = delta if self.counts_negative else 0.0
        return slope * jnp.where(positive, d_weight - delta, jnp.where(score < 0, below, 0.0))


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """w = sigmoid(x + bias) = (1 + tanh((x + bias) / 2)) / 2."""

    bias: float

    base = 0.5
    hidden = MASKED
    has_top = False
    counts_numerators = False
    is_smooth = True

    def start(self, sink):
        return None

    def terms(self, score, top):
        return 0.5 + 0.5 * jnp.tanh(score + 0.5 * self.bias), None

    def denominator(self, total, top, sink):
        return None

    def slopes(self, score, log_denominator):
        weight, _ = self.terms(score, None)
        return weight, weight * (1 - weight)

    def d_logits(self, slope, score, d_weight, delta):
        return slope * d_weight


@dataclasses.dataclass(frozen=True)
class Relu:
    """w = relu(x) / divisor."""

    divisor: float

    base = 1.0
    hidden = 0.0
    has_top = False
    counts_numerators = False
    is_smooth = False

    def start(self, sink):
        return None

    def terms(self, score, top):
        return jnp.maximum(score, 0) * (1 / self.divisor), None

    def denominator(self, total, top, sink):
        return None

    def slopes(self, score, log_denominator):
        return self.terms(score, None)[0], jnp.where(score > 0, 1 / self.divisor, 0.0)

    def d_logits(self, slope, score, d_weight, delta):
        return slope * d_weight


Policy = ExpSum | Rectified | Sigmoid | Relu


def policy_of(normalizer: normalizers.Normalizer) -> Policy:
    """The policy of a normaliser.

    Raises:
        NotImplementedError: it has none; the reason, and what serves it.
    """
    match normalizer:
        case normalizers.Softmax() | normalizers.Softmax1() | normalizers.SoftmaxN():
            return ExpSum()
        case normalizers.Softpick(epsilon=epsilon):
            return Rectified(epsilon)
        case normalizers.ReluSoftmax(epsilon=epsilon):
            return Rectified(epsilon, counts_negative=False)
        case normalizers.Sigmoid(bias=bias, normalized=False):
            return Sigmoid(bias)
        case normalizers.Relu(divisor=divisor, normalized=False, by_length=False):
            return Relu(divisor)
    raise NotImplementedError(
        "normalizer: softmax, softmax1, softmax_n, sigmoid, relu, softpick and relu_softmax are built, "
        f"got {normalizer}; `flash.xla` or `flash.rows` serves it"
    )
