"""The families of normalisers in running form: some keys at a time.

A row's state is `top` (what the exponentials are shifted by), `total` (what the sum of weighted values is
divided by) and that sum. Nothing here indexes memory: plain arithmetic on values, in float32.
"""

import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import normalizers as n
from sinkjax_kernels.normalizers.elementwise import SMALLEST_SUM

MASKED = -0.7 * float(np.finfo(np.float32).max)  # not −inf: −inf − −inf would be NaN


def is_built(normalizer: n.Normalizer) -> bool:
    """Whether one pass over the keys is enough for it."""
    return normalizer.family in ("exp_sum", "elementwise", "rectified")


def shifts(normalizer: n.Normalizer) -> bool:
    """Whether weights are exponentials relative to `top`; else `top` is never read."""
    if isinstance(normalizer, n.Sigmoid):
        return normalizer.normalized
    return normalizer.family != "elementwise"


def begin(normalizer: n.Normalizer, rows: tuple[int, ...], sink):
    """`top` and `total` before any key, as columns; `sink` is the column of sink logits or None."""
    zero = jnp.zeros((*rows, 1), jnp.float32)
    constant = n.constant_sink(normalizer)
    if constant is not None:
        sink = zero + constant
    if sink is not None:
        return sink, zero + 1
    from_zero = isinstance(normalizer, n.Softpick | n.ReluSoftmax)
    return zero if from_zero else zero + MASKED, zero


def weigh(normalizer: n.Normalizer, logits, where, top, learned):
    """The new `top`, the weights before division, and what each key adds to `total`, or None.

    Args:
        where: visible keys; both results are 0 at the others, whatever the logits are there.
        learned: the leaves of the normaliser by name, as columns.
    """

    def constant(name):
        return getattr(normalizer, name) + learned.get(name, 0.0)

    def masked(x):
        return jnp.where(where, x, 0.0)

    match normalizer:
        case n.Sigmoid(normalized=False):
            return top, masked(0.5 + 0.5 * jnp.tanh(0.5 * (logits + constant("bias")))), None
        case n.Relu():
            weights = masked(jnp.maximum(logits, 0.0) * (1 / normalizer.divisor))
            counted = weights if normalizer.normalized else None
            return top, weights, masked(1.0) if normalizer.by_length else counted
        case n.Elu() | n.Identity():
            weights = masked(logits)
            return top, weights, weights if normalizer.normalized else None
        case n.ConSmax():
            exponent = jnp.minimum(logits - constant("shift"), n.LARGEST_EXPONENT)
            return top, masked(jnp.exp(exponent) / constant("divisor")), None
        case n.Softpick() | n.ReluSoftmax():
            seen = masked(logits)
            top = jnp.maximum(top, seen.max(axis=-1, keepdims=True))
            half = jnp.tanh(0.5 * jnp.abs(seen))  # 1 − e^−|x| = 2 tanh(|x|/2) / (1 + tanh(|x|/2))
            size = jnp.exp(jnp.maximum(seen, 0.0) - top) * (2 * half / (1 + half))
            weights = jnp.where(seen > 0, size, 0.0)
            return top, weights, size if isinstance(normalizer, n.Softpick) else weights
        case n.RectifiedOnly():
            where = where & (logits >= 0)
            z = logits
        case n.SigSoftmax():
            z = logits + _log_sigmoid(logits)
        case n.Sigmoid():
            z = _log_sigmoid(logits + constant("bias"))
        case n.Cog():
            z = jnp.abs(logits)
        case _:
            z = logits
    z = jnp.where(where, z, MASKED)
    top = jnp.maximum(top, z.max(axis=-1, keepdims=True))
    terms = jnp.where(where, jnp.exp(z - top), 0.0)
    if isinstance(normalizer, n.Cog):
        signed = jnp.where(logits > 0, terms, 0.0) - jnp.where(logits < 0, terms, 0.0)
        return top, signed, terms
    return top, terms, terms


def end(normalizer: n.Normalizer, top, total, acc):
    """The output, and the log-sum-exp column (−inf for a row of nothing) or None."""
    match normalizer:
        case n.Identity(normalized=True):
            return acc / jnp.maximum(jnp.abs(total), 1.0), None
        case n.Relu(by_length=True):
            return acc / jnp.maximum(total, 1.0), None
        case n.Relu(normalized=True) | n.Elu(normalized=True):
            return acc / (total + SMALLEST_SUM), None
        case n.Softpick() | n.ReluSoftmax():
            total = total + normalizer.epsilon * jnp.exp(-top)
    if not shifts(normalizer):
        return acc, None
    is_empty = total == 0
    safe = jnp.where(is_empty, 1.0, total)
    out = acc / safe
    if not normalizer.has_log_sum_exp:
        return out, None
    return out, jnp.where(is_empty, -jnp.inf, top + jnp.log(safe))


def _log_sigmoid(x):
    return jnp.minimum(x, 0.0) - jnp.log(1.0 + jnp.exp(-jnp.abs(x)))
