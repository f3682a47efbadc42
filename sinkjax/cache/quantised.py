"""Old tokens in few bits: sink tokens | groups quantised once | the last tokens in full precision."""

import dataclasses

import jax.numpy as jnp

from sinkjax.cache.descriptions import Full, SinkWindow
from sinkjax.cache.quantised_body import Coding
from sinkjax.cache.quantised_ring import QuantisedRing
from sinkjax.cache.store import LayerSpec, Store, at_least
from sinkjax.ops.quantize import BITS

_FIRST_OF_FULL = 4
"""Tokens that a `Full` cache protects by itself: as many as StreamingLLM keeps."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    r"""What `inner` keeps, its older tokens in 2, 4 or 8 bits; a `Description`.

    Three segments: the first F tokens in full precision, where the sinks are | groups of g tokens,
    quantised once | the last tokens in full precision. Keys share a scale per channel with the
    tokens of their group, values with the channels of their token.

    The rule: group n holds the positions F + n g … F + n g + g − 1, however the stream was cut, and
    query t meets it quantised if and only if $t - (F + n g + g - 1) \ge R$. So every query meets
    at least the R last tokens as they came, and at most R + g − 1 of them. What is stored is never
    rotated, read back or quantised again.

    Why the sinks: their outliers stretch the scales of all that share them, and every query looks at
    them. Pinned sinks (`SinkWindow("auto")`) are protected wherever they are, and leave a place in
    their group empty.

    Cost of a step: all groups are unpacked into the dtype of the cache beside the other tokens, in
    each layer anew. What is small is what is stored; while a layer attends it takes the memory,
    and more than the time, of the cache without quantisation.

    Within one chunk positions must not jump (between chunks they may): such a row gives NaN.

    Args:
        inner: a `SinkWindow` or a `Full`; what a query sees is what it says.
        bits: 2, 4 or 8, of keys and values.
        group_size: g, tokens that share the scales of a key.
        residual: R, at least 1. A layer in which no group would ever leave the last tokens keeps the
            ring of `inner`.
        first_full_precision: F, "Preserve-First-N". None: the sink tokens of `inner`, and 4 of a
            `Full`. 0 protects nothing. Not with pinned sinks, which are what is protected.
        value_group_size: channels of a token that share a scale of its value; None is all of a head.
        symmetric: scales about 0, without a zero per group.
        scale_dtype: of scales and zeros; None is that of the cache.

    Source: KIVI (Liu et al. 2024, arXiv 2402.02750) with groups and residual of its released code;
    the first segment as in KVQuant (Hooper et al. 2024, arXiv 2401.18079) and SKVQ (Duanmu et al.
    2024, arXiv 2405.06219); sinks found anywhere after KVSink (arXiv 2508.04257).
    """

    inner: SinkWindow | Full
    bits: int = 4
    group_size: int = 32
    residual: int = 128
    first_full_precision: int | None = None
    value_group_size: int | None = None
    symmetric: bool = False
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, SinkWindow | Full):
            raise ValueError(f"Quantised.inner: expected SinkWindow or Full, got {self.inner!r}")
        if self.bits not in BITS:
            raise ValueError(f"Quantised.bits: expected 2, 4 or 8, got {self.bits!r}")
        at_least("Quantised.group_size", self.group_size, 1)
        at_least("Quantised.residual", self.residual, 1)
        if self.first_full_precision is not None:
            at_least("Quantised.first_full_precision", self.first_full_precision, 0)
        if self.value_group_size is not None:
            at_least("Quantised.value_group_size", self.value_group_size, 1)
        if self.scale_dtype is not None and not jnp.issubdtype(self.scale_dtype, jnp.floating):
            raise ValueError(
                f"Quantised.scale_dtype: expected a float dtype, got {self.scale_dtype!r}"
            )

    @property
    def capacity(self) -> int:
        """That of `inner`, in tokens."""
        return self.inner.capacity

    def store(self, spec: LayerSpec, layer: int = 0, num_layers: int = 1) -> Store:
        """The mask of `inner`, and its ring where no group would ever be quantised.

        Raises:
            ValueError: a head that value groups do not divide; first tokens with pinned sinks; sink
                tokens that are to be quantised, and are not yet when `cache_relative` begins to
                hold them at a distance that is not their own.
        """
        if spec.head_dim % (self.value_group_size or 1):
            raise ValueError(
                f"Quantised.value_group_size: expected to divide the head size {spec.head_dim}, "
                f"got {self.value_group_size}"
            )
        plan, first = self.inner.store(spec, layer, num_layers), self.first_full_precision
        if plan.pinned and first is not None:
            raise ValueError(
                f"Quantised.first_full_precision: expected None, where the pinned tokens are in full "
                f"precision, got {first}"
            )
        if first is None:
            first = _FIRST_OF_FULL if plan.window is None else plan.sink_slots
        first = 0 if plan.pinned else first
        coding = Coding(self.bits, self.value_group_size, self.symmetric, self.scale_dtype)
        store = QuantisedRing(plan, coding, self.group_size, self.residual, first)
        if store.turning == 0:
            return plan
        last = first + store.lasting * self.group_size + self.residual - 2
        if store.lasting and plan.position_cap is not None and last > plan.position_cap:
            raise ValueError(
                f"Quantised.first_full_precision: expected the {plan.sink_slots} sink tokens, or a "
                f"window of at least {last + 1 - plan.sink_slots} to quantise them in "
                f"cache_relative, got {first} and {plan.ring_slots}"
            )
        return store
