"""Normalisers: from logits to attention weights. This package is the specification.

A normaliser is a frozen, hashable description; `weights` says in float32 (float64 for float64 logits)
what it means. Kernels implement *families*, not names; there is one file for each:

    exp_sum      w = exp(z) / (exp(s) + sum exp(z)): softmax, softmax1, softmax_n, sink logits,
                 sigsoftmax, cog
    elementwise  w = f(x): sigmoid, relu, elu, identity, consmax; and their normalised forms
    rectified    exact zeros below 0: softpick, rectified_only, relu_softmax, scaled_softpick
    two_pass     a number of the row comes first: ssmax, clipped_softmax, elastic_softmax
    sparse       w = [x − tau]_+ to a power: sparsemax, entmax15, entmax
    ordered      by the distance of the keys: stick_breaking

Every function gives 0 where nothing is visible, and a zero gradient with it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

# Descriptions
from sinkjax_kernels.normalizers.description import NAMES as NAMES
from sinkjax_kernels.normalizers.description import Family as Family
from sinkjax_kernels.normalizers.description import Normalizer as Normalizer
from sinkjax_kernels.normalizers.description import Rows as Rows
from sinkjax_kernels.normalizers.description import resolve as resolve

# Exp-sum
from sinkjax_kernels.normalizers.exp_sum import Softmax as Softmax
from sinkjax_kernels.normalizers.exp_sum import Softmax1 as Softmax1
from sinkjax_kernels.normalizers.exp_sum import SoftmaxN as SoftmaxN
from sinkjax_kernels.normalizers.exp_sum import SigSoftmax as SigSoftmax
from sinkjax_kernels.normalizers.exp_sum import Cog as Cog
from sinkjax_kernels.normalizers.exp_sum import constant_sink as constant_sink
from sinkjax_kernels.normalizers.exp_sum import exponent as exponent

# Elementwise
from sinkjax_kernels.normalizers.elementwise import LARGEST_EXPONENT as LARGEST_EXPONENT
from sinkjax_kernels.normalizers.elementwise import Sigmoid as Sigmoid
from sinkjax_kernels.normalizers.elementwise import Relu as Relu
from sinkjax_kernels.normalizers.elementwise import Elu as Elu
from sinkjax_kernels.normalizers.elementwise import Identity as Identity
from sinkjax_kernels.normalizers.elementwise import ConSmax as ConSmax
from sinkjax_kernels.normalizers.elementwise import feature_map as feature_map

# Rectified
from sinkjax_kernels.normalizers.rectified import Softpick as Softpick
from sinkjax_kernels.normalizers.rectified import RectifiedOnly as RectifiedOnly
from sinkjax_kernels.normalizers.rectified import ReluSoftmax as ReluSoftmax
from sinkjax_kernels.normalizers.rectified import ScaledSoftpick as ScaledSoftpick
from sinkjax_kernels.normalizers.rectified import signed_excess as signed_excess

# Two passes
from sinkjax_kernels.normalizers.two_pass import ScalableSoftmax as ScalableSoftmax
from sinkjax_kernels.normalizers.two_pass import ClippedSoftmax as ClippedSoftmax
from sinkjax_kernels.normalizers.two_pass import (
    NormalizedClippedSoftmax as NormalizedClippedSoftmax,
)
from sinkjax_kernels.normalizers.two_pass import ElasticSoftmax as ElasticSoftmax

# Sparse
from sinkjax_kernels.normalizers.sparse import Sparsemax as Sparsemax
from sinkjax_kernels.normalizers.sparse import Entmax15 as Entmax15
from sinkjax_kernels.normalizers.sparse import Entmax as Entmax

# Ordered
from sinkjax_kernels.normalizers.ordered import StickBreaking as StickBreaking


def weights(
    normalizer: Normalizer,
    logits: Float[Array, "*rows S"],
    where: Bool[Array, "*#rows #S"],
    *,
    sinks: Float[Array, "*#rows"] | None = None,
    params: Mapping[str, Any] | None = None,
    key_order: Num[Array, "*#keys"] | None = None,
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"] | None]:
    """Attention weights of each row, and its log-sum-exp where the normaliser has one.

    Args:
        normalizer: the description.
        logits: after scale, soft cap and bias; any float type, computed in float32 at least.
        where: True where the key is visible.
        sinks: sink logits, broadcastable to the rows; only with `Softmax`.
        params: learned leaves, added to the constants of the description; broadcastable to the logits.
        key_order: for the ordered family, numbers that grow from the first key to the last, their
            positions; broadcastable to the logits along all axes but the last. None: buffer order.

    Returns:
        weights (0 where not visible) and the log-sum-exp with the sink term, −inf for a row that
        sees nothing and has no sink; None for normalisers without one.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    where = jnp.broadcast_to(where, logits.shape)
    if sinks is not None and not normalizer.takes_sinks:
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {normalizer}")
    unknown = set(params or {}) - set(normalizer.parameters)
    if unknown:
        raise ValueError(
            f"normalizer_params: {normalizer} takes {list(normalizer.parameters)}, "
            f"got {sorted(unknown)}"
        )
    return normalizer.weigh(Rows(logits, where, sinks, params or {}, key_order))
