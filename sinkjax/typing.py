"""The letters of the shapes, and names for the arrays that cross most borders.

One letter per dimension, the same in annotations, einsum strings and names of local variables:

    B  batch              D  model width
    T  query length       F  feed-forward width
    S  key length         V  vocabulary
    N  query heads        L  layers
    K  key/value heads    P  sink tokens
    G  = N / K            W  window, in keys, the query's own included
    H  head size          C  = P + W, cache slots

Activations are `[B, T, N, H]`, cache leaves `[B, K, C, H]`. A local variable may carry its shape as
a suffix (`q_BTNH`); public arguments have plain names and carry it in their annotation.
"""

from typing import TypeAlias

from jaxtyping import Array, Float, Int

Tokens: TypeAlias = Int[Array, "B T"]
"""Token ids."""

Positions: TypeAlias = Int[Array, "B T"]
"""Position of each token in its document or stream; -1 is padding."""

SegmentIds: TypeAlias = Int[Array, "B T"]
"""Which document of a packed row each token belongs to; 0 is padding."""

Hidden: TypeAlias = Float[Array, "B T D"]
"""The residual stream."""

Heads: TypeAlias = Float[Array, "B T N H"]
"""Queries, or the output of attention before its projection."""

KeyValueHeads: TypeAlias = Float[Array, "B S K H"]
"""Keys or values."""

Logits: TypeAlias = Float[Array, "B T V"]
"""Unnormalised log-probabilities of the next token."""
