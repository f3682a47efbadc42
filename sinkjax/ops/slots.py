"""Learned keys and values that every query sees, and whatever else joins the denominator.

A slot is no token: mask, window, position and segment do not concern it, so it is never laid beside
the keys. Its logit joins the sink logit by log-sum-exp, and its value is added in proportion to its
weight; any kernel with sink logits and a log-sum-exp serves. A query of a packed row sees the slots
beside its own segment only: that is one sink slot per segment, at no cost.
"""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax_kernels import normalizers
from sinkjax_kernels.normalizers import Normalizer, Softmax, Softmax1, SoftmaxN

SlotMode: TypeAlias = Literal["key", "value", "key_value", "context"]
SlotPosition: TypeAlias = Literal["start", "none"]

_EXACT = jax.lax.Precision.HIGHEST


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value"],
    meta_fields=["mode", "position"],
)
@dataclasses.dataclass(frozen=True)
class Slots:
    r"""m learned slots per key/value head, with $b = \mathrm{cap}(\mathrm{scale}\; q_t k')$.

    - ``key_value``: attention over the keys [k'; K] and the values [v'; V];
    - ``key``: the same with v' = 0, which is a sink logit per token;
    - ``value``: o_t + Σ v', whatever the weights;
    - ``context``: o_t + Σ e^b / (e^b + Σ_j e^{x_j}) v', where the real keys keep all their weight.

    Args:
        key: `[K, m, H]`; None with ``value``.
        value: `[K, m, Hv]`; None with ``key``.
        mode: one of the four above.
        position: the query that scores k': ``start`` the one after RoPE, as if k' were at position
            0, ``none`` the one before it.

    Source: ``key_value`` Sun et al. 2024, arXiv 2402.17762; ``key`` and ``value`` Gu et al.
    2024, arXiv 2410.10781; ``context`` An et al. 2025, arXiv 2502.06415; several slots are
    the memory key/values of Sukhbaatar et al. 2019, arXiv 1907.01470.
    """

    # `Any` in pytrees: their leaves are not always arrays.
    key: Any
    value: Any
    mode: SlotMode = "key_value"
    position: SlotPosition = "start"

    @property
    def competes(self) -> bool:
        """Whether the slots take weight from the keys: their logits belong to the denominator."""
        return self.mode in ("key", "key_value")

    @property
    def reads_lse(self) -> bool:
        """Whether `add_slot_values` needs the log-sum-exp of the attention call."""
        return self.mode in ("key_value", "context")


def slot_logits(
    query: Float[Array, "B T N H"],
    slots: Slots | None,
    *,
    scale: float | Float[Array, ""] | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B T N m"] | None:
    r"""$b = \mathrm{cap}(\mathrm{scale}\; q_t k')$, float32 at least; None where no slot is scored.

    Args:
        query: rotated or not, as `slots.position` says.
        slots: None, or mode ``value``, which has no logits.
        scale, logits_soft_cap: those of the attention call; the scale is 1/√H by default.

    Raises:
        ValueError: an unknown mode or position, or arrays of another shape.
    """
    if slots is None:
        return None
    for name, choices in (("mode", SlotMode), ("position", SlotPosition)):
        if getattr(slots, name) not in get_args(choices):
            raise ValueError(
                f"slots.{name}: expected one of {', '.join(get_args(choices))}, "
                f"got {getattr(slots, name)!r}"
            )
    if slots.mode == "value":
        return None
    B, T, N, H = query.shape
    K, m = slots.key.shape[:2]
    if slots.key.shape != (K, m, H) or N % K:
        raise ValueError(
            f"slots.key: expected [K, m, H={H}] with K dividing N={N}, got {slots.key.shape}"
        )
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "BTKGH,KmH->BTKGm",
        query.astype(dtype).reshape(B, T, K, N // K, H),
        slots.key.astype(dtype),
        precision=_EXACT,
    ).reshape(B, T, N, m)
    logits = logits * jnp.asarray(H**-0.5 if scale is None else scale, dtype)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    return logits


def join_sinks(
    normalizer: str | Normalizer,
    *sinks: Float[Array, "..."] | None,
    shift: Float[Array, "B T N"] | None = None,
) -> tuple[Normalizer, Float[Array, " N"] | Float[Array, "B T N"] | None]:
    r"""Everything in the denominator besides keys as one sink logit, $\log \sum_i e^{s_i}$.

    Attention kernels take one sink logit, per head or per token and head, with plain softmax. Any
    number of learned sinks, the constants of softmax1 and softmax_n, and slots come to the same.

    Args:
        normalizer: softmax, softmax1 or softmax_n; any other passes when there is nothing to join.
        sinks: `[N]`, several per head `[N, m]`, per token `[B, T, N]` or `[B, T, N, m]`; None is
            left out. Neither scaled nor capped here.
        shift: what the caller has left out of the logits of all keys of a row (`decay_bias`); the
            sinks must move with them. Plain softmax without sinks does not notice.

    Returns:
        the normaliser and the sink logits for the attention call, float32 at least; unchanged and
        None when there is nothing to join.

    Raises:
        ValueError: a normaliser whose denominator takes no such terms.
    """
    described = normalizers.resolve(normalizer)
    given = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in sinks if x is not None]
    if not given and shift is None:
        return described, None
    if not isinstance(described, Softmax | Softmax1 | SoftmaxN):
        raise ValueError(
            f"normalizer: expected softmax, softmax1 or softmax_n with sinks, slots or a shift, "
            f"got {described}"
        )
    constant = normalizers.constant_sink(described)
    terms = [jax.nn.logsumexp(x, axis=-1) if x.ndim in (2, 4) else x for x in given]
    if constant is not None:
        dtype = shift.dtype if shift is not None else terms[0].dtype
        terms.append(jnp.asarray(constant, jnp.promote_types(dtype, jnp.float32)))
    if not terms:
        return described, None
    joined = functools.reduce(jnp.logaddexp, terms)
    return Softmax(), joined if shift is None else joined + shift


def add_slot_values(
    out: Float[Array, "B T N h"],
    slots: Slots | None,
    logits: Float[Array, "B T N m"] | None,
    lse: Float[Array, "B T N"] | None,
    *,
    where: Bool[Array, "#B T"] | None = None,
) -> Float[Array, "B T N h"]:
    r"""$o_t + \sum e^{b - \mathrm{lse}} v'$: the part of the output that comes from the slots.

    Args:
        out: of the attention call with the sinks of `join_sinks`.
        slots: None returns `out` as it is.
        logits: of `slot_logits`.
        lse: residual of the attention call, with what `join_sinks` put into it; with a `shift`
            minus that shift. Needed where `slots.reads_lse`.
        where: queries that are no padding; the others keep their 0. None: all.

    Returns:
        `[B, T, N, h]` in the dtype of `out`; float32 at least within.

    Raises:
        ValueError: slot values of another shape, or no log-sum-exp where one is needed.
    """
    if slots is None or slots.mode == "key":
        return out
    B, T, N, h = out.shape
    K, m = slots.value.shape[:2]
    if slots.value.shape != (K, m, h) or N % K:
        raise ValueError(
            f"slots.value: expected [K, m, h={h}] with K dividing N={N}, got {slots.value.shape}"
        )
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    value = slots.value.astype(dtype)
    if slots.mode == "value":
        added = jnp.repeat(value.sum(axis=1), N // K, axis=0)[None, None]
    else:
        if logits is None or lse is None:
            raise ValueError(f"lse: expected logits and log-sum-exp with {slots.mode!r}, got None")
        if slots.mode == "context":
            lse = jnp.logaddexp(lse, jax.nn.logsumexp(logits, axis=-1))
        weights = jnp.exp(logits - lse[..., None]).astype(dtype).reshape(B, T, K, N // K, m)
        added = jnp.einsum("BTKGm,Kmh->BTKGh", weights, value, precision=_EXACT)
        added = added.reshape(out.shape)
    if where is not None:
        added = jnp.where(where[..., None, None], added, 0)
    return (out.astype(dtype) + added).astype(out.dtype)
