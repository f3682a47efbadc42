"""Normalisers: from logits to attention weights. This file is the specification.

A normaliser is a frozen, hashable description; `weights` says in float32 (float64 for float64 logits)
what it means. Kernels implement *families*, not names:

- ``exp_sum``      w = exp(x) / (exp(s) + sum exp(x)): softmax, softmax1, softmax_n, sink logits
- ``elementwise``  w = f(x): sigmoid
- ``rectified``    w = relu(e^x - 1) / (sum |e^x - 1| + epsilon): softpick

Every function gives 0 where nothing is visible, and a zero gradient with it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Family = Literal["exp_sum", "elementwise", "rectified"]


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """What all normalisers share: a family, and the parameters that a module may own for it."""

    family: ClassVar[Family]
    parameters: ClassVar[tuple[str, ...]] = ()
    """Names accepted in `normalizer_params`, each one number per query head."""

    @property
    def has_log_sum_exp(self) -> bool:
        """Whether the denominator is a log-sum-exp that can be returned as a residual."""
        return self.family == "exp_sum"

    def __str__(self) -> str:
        """The spelling that `resolve` reads back."""
        fields = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        name = NAMES[type(self)]
        return f"{name}({', '.join(fields)})" if fields else name


@dataclasses.dataclass(frozen=True)
class Softmax(Normalizer):
    r"""$w_j = e^{x_j} / (e^{s} + \sum_k e^{x_k})$, with the sink logit $s = -\infty$ when there is none.

    Source: Vaswani et al. 2017, eq. 1; the learned sink logit: gpt-oss (OpenAI 2025).
    """

    family: ClassVar[Family] = "exp_sum"


@dataclasses.dataclass(frozen=True)
class Softmax1(Normalizer):
    r"""$w_j = e^{x_j} / (1 + \sum_k e^{x_k})$: a head may attend to nothing. A sink logit fixed at 0.

    Source: Miller, "Attention Is Off By One" (2023).
    """

    family: ClassVar[Family] = "exp_sum"


@dataclasses.dataclass(frozen=True)
class SoftmaxN(Normalizer):
    r"""$w_j = e^{x_j} / (n + \sum_k e^{x_k})$: softmax1 with another constant; n = 0 is softmax.

    Source: Murphy, "softmax_n" (flash-attention-softmax-n, 2023).
    """

    n: float = 1.0
    family: ClassVar[Family] = "exp_sum"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.n) and self.n >= 0):
            raise ValueError(f"softmax_n: n must be a finite number of at least 0, got {self.n}")


@dataclasses.dataclass(frozen=True)
class Sigmoid(Normalizer):
    r"""$w_j = \sigma(x_j + b)$: no row is normalised, so no row needs a sink.

    `bias` is the constant b; $-\ln n$ for a context of n keys keeps the initial row mass near one
    (Ramapuram et al. 2024, arXiv 2409.04431, §3). A learned bias per head comes as the parameter
    ``bias`` and is added to the constant.
    """

    bias: float = 0.0
    family: ClassVar[Family] = "elementwise"
    parameters: ClassVar[tuple[str, ...]] = ("bias",)

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"sigmoid: bias must be finite, got {self.bias}")


@dataclasses.dataclass(frozen=True)
class Softpick(Normalizer):
    r"""$w_j = \mathrm{relu}(e^{x_j} - 1) / (\sum_k |e^{x_k} - 1| + \epsilon)$: sparse, at most one.

    Computed with $m = \max(0, \max_k x_k)$; the published kernels shift by the row maximum alone and
    overflow below -88, and add their epsilon in the shifted scale. Here epsilon is unshifted.
    Source: Zuhri et al. 2025, arXiv 2504.20966, eq. 4.
    """

    epsilon: float = 1e-8
    family: ClassVar[Family] = "rectified"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"softpick: epsilon must be at least 0, got {self.epsilon}")


NAMES: dict[type[Normalizer], str] = {
    Softmax: "softmax",
    Softmax1: "softmax1",
    SoftmaxN: "softmax_n",
    Sigmoid: "sigmoid",
    Softpick: "softpick",
}
_TYPES = {name: kind for kind, name in NAMES.items()}


def resolve(spec: str | Normalizer) -> Normalizer:
    """A normaliser from its name, with arguments where it takes some.

    >>> resolve("softmax_n(n=2.0)")
    SoftmaxN(n=2.0)
    >>> str(resolve("sigmoid(bias=-3.5)"))
    'sigmoid(bias=-3.5)'

    Raises:
        ValueError: unknown name (the choices are listed) or arguments that it does not take.
    """
    if isinstance(spec, Normalizer):
        return spec
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", spec)
    if match is None or match[1] not in _TYPES:
        raise ValueError(f"normalizer: expected one of {', '.join(_TYPES)}, got {spec!r}")
    kind, arguments = _TYPES[match[1]], {}
    for part in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        name, _, number = part.partition("=")
        known = [field.name for field in dataclasses.fields(kind)]
        try:
            arguments[name.strip()] = float(number)
        except ValueError:
            raise ValueError(f"normalizer {spec!r}: expected name=number, got {part!r}") from None
        if name.strip() not in known:
            raise ValueError(
                f"normalizer {spec!r}: {match[1]} takes {', '.join(known) or 'no argument'}, "
                f"got {name.strip()!r}"
            )
    return kind(**arguments)


def constant_sink(normalizer: Normalizer) -> float | None:
    """The fixed sink logit of an exp-sum normaliser: 0 for softmax1, ln n for softmax_n."""
    match normalizer:
        case Softmax1():
            return 0.0
        case SoftmaxN(n=n) if n > 0:
            return math.log(n)
    return None


def weights(
    normalizer: Normalizer,
    logits: Float[Array, "*rows S"],
    where: Bool[Array, "*#rows #S"],
    *,
    sinks: Float[Array, "*#rows"] | None = None,
    params: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"] | None]:
    """Attention weights of each row, and its log-sum-exp where the normaliser has one.

    Args:
        normalizer: the description.
        logits: after scale, soft cap and bias; any float type, computed in float32 at least.
        where: True where the key is visible.
        sinks: sink logits, broadcastable to the rows; only with `Softmax`.
        params: learned leaves of the normaliser, broadcastable to the logits.

    Returns:
        weights (0 where not visible) and the log-sum-exp with the sink term, −inf for a row that
        sees nothing and has no sink; None for normalisers without one.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    where = jnp.broadcast_to(where, logits.shape)
    if sinks is not None and not isinstance(normalizer, Softmax):
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {normalizer}")
    unknown = set(params or {}) - set(normalizer.parameters)
    if unknown:
        raise ValueError(
            f"normalizer_params: {normalizer} takes {list(normalizer.parameters)}, "
            f"got {sorted(unknown)}"
        )
    match normalizer:
        case Sigmoid(bias=bias):
            learned = (params or {}).get("bias", 0.0)
            return jnp.where(where, jax.nn.sigmoid(logits + bias + learned), 0), None
        case Softpick(epsilon=epsilon):
            return _softpick(logits, where, epsilon), None
    constant = constant_sink(normalizer)
    if constant is not None:
        sinks = jnp.full((), constant, logits.dtype)
    return _exp_sum(logits, where, sinks)


def _exp_sum(logits, where, sinks):
    """softmax over the visible keys and one more entry, the sink, that has no value."""
    top = jnp.max(logits, axis=-1, where=where, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(logits.dtype)
        top = jnp.maximum(top, sinks)  # s in the maximum: exp(s - m) cannot overflow
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    # The inner `where` keeps exp finite at masked keys, or their zero gradient would be 0 * inf.
    shifted = jnp.where(where, logits - top[..., None], 0)
    terms = jnp.where(where, jnp.exp(shifted), 0)
    total = terms.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    return terms / safe[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(safe))


def signed_excess(logits: Array, top: Array) -> Array:
    """(e^x − 1) e^−m for m ≥ max(0, x), with neither overflow nor cancellation near x = 0."""
    magnitude = -jnp.expm1(-jnp.abs(logits))
    return jnp.sign(logits) * jnp.exp(jnp.maximum(logits, 0) - top) * magnitude


def _softpick(logits, where, epsilon):
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, where=where, initial=0.0))
    excess = signed_excess(jnp.where(where, logits, 0), top[..., None])  # 0 at masked keys
    total = jnp.abs(excess).sum(axis=-1) + epsilon * jnp.exp(-top)
    safe = jnp.where(total == 0, 1, total)
    return jax.nn.relu(excess) / safe[..., None]
