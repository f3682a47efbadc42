"""What a normaliser is: a frozen description, its name, and the rows of logits that it weighs."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Family = Literal["exp_sum", "elementwise", "rectified", "two_pass", "sparse", "ordered"]

Weighed = tuple[Float[Array, "*rows S"], Float[Array, "*rows"] | None]
"""Weights, and the log-sum-exp of a normaliser that has one."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of attention, as `weights` hands them to a description.

    Args:
        logits: after scale, soft cap and bias; float32 at least.
        where: True where the key is visible, of the same shape.
        sinks: sink logits, broadcastable to the rows.
        params: learned leaves, broadcastable to the logits.
        key_order: numbers that order the keys, broadcastable to the logits; None is buffer order.
    """

    # `Any`: tree transformations and tracing put all sorts of things in the place of arrays.
    logits: Any
    where: Any
    sinks: Any = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key_order: Any = None

    @property
    def seen(self) -> Float[Array, "*rows S"]:
        """The logits, and 0 at keys that are not visible: a gradient of 0 there is no 0 · inf."""
        return jnp.where(self.where, self.logits, 0)

    @property
    def count(self) -> Float[Array, "*rows 1"]:
        """Visible keys of each row, and 1 for a row that sees none."""
        number = self.where.sum(axis=-1, keepdims=True)
        return jnp.maximum(number, 1).astype(self.logits.dtype)

    def constant(self, normalizer: "Normalizer", name: str) -> Any:
        """A constant of the description, with what was learned added to it."""
        fixed = getattr(normalizer, name)
        return fixed + self.params[name] if name in self.params else fixed

    def masked(self, weights: Float[Array, "*rows S"]) -> Float[Array, "*rows S"]:
        """The weights, and 0 at keys that are not visible."""
        return jnp.where(self.where, weights, 0)


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """What all normalisers share; `weigh` of each says what it means.

    Subclasses give their name as `class Softmax(Normalizer, name="softmax")`.
    """

    family: ClassVar[Family]
    """Which kind of algorithm computes it; `flash.families` knows which have a blockwise one."""
    parameters: ClassVar[tuple[str, ...]] = ()
    """Fields that may be learned: a leaf in `normalizer_params` is added to the constant."""
    has_log_sum_exp: ClassVar[bool] = False
    """Whether the denominator is a log-sum-exp that can be returned as a residual."""
    is_signed: ClassVar[bool] = False
    """Whether a weight can be negative."""
    excludes_self: ClassVar[bool] = False
    """Whether a query does not see the key at its own position."""
    needs_causal: ClassVar[bool] = False
    """Whether it means nothing when later keys are visible."""
    takes_sinks: ClassVar[bool] = False
    """Whether it takes sink logits."""

    def __init_subclass__(cls, *, name: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        NAMES[cls] = name

    @property
    def sums_to_one(self) -> bool:
        """Whether a row that gives any weight gives 1: what one key loses another must take.

        Most of these give weight to each row that sees a key; rows of a rectified one may be all 0.
        """
        return False

    def weigh(self, rows: Rows) -> Weighed:
        """The specification, in the dtype of the logits; 0 at keys that are not visible."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The spelling that `resolve` reads back."""
        fields = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        name = NAMES[type(self)]
        return f"{name}({', '.join(fields)})" if fields else name


NAMES: dict[type[Normalizer], str] = {}
"""The name of each description, in the order in which they are defined."""

_BOOLEANS = {"True": True, "False": False}


def resolve(spec: str | Normalizer) -> Normalizer:
    """A normaliser from its name, with arguments where it takes some.

    >>> resolve("softmax_n(n=2.0)")
    SoftmaxN(n=2.0)
    >>> str(resolve("relu(normalized=True)"))
    'relu(normalized=True)'

    Raises:
        ValueError: unknown name (the choices are listed) or arguments that it does not take.
    """
    if isinstance(spec, Normalizer):
        return spec
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", spec)
    kinds = {name: kind for kind, name in NAMES.items()}
    if match is None or match[1] not in kinds:
        raise ValueError(f"normalizer: expected one of {', '.join(kinds)}, got {spec!r}")
    kind, arguments = kinds[match[1]], {}
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    for part in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ValueError(
                f"normalizer {spec!r}: {match[1]} takes {', '.join(known) or 'no argument'}, "
                f"got {name!r}"
            )
        is_bool = known[name] is bool
        try:
            arguments[name] = _BOOLEANS[value] if is_bool else float(value)
        except (KeyError, ValueError):
            wanted = "name=True or name=False" if is_bool else "name=number"
            raise ValueError(f"normalizer {spec!r}: expected {wanted}, got {part!r}") from None
    return kind(**arguments)


def expect(normalizer: Normalizer, name: str, holds: bool, wanted: str) -> None:
    """Refuse a constant: `holds` and that the number is finite must be true.

    Raises:
        ValueError: names the normaliser, the constant, what was expected and what came.
    """
    value = getattr(normalizer, name)
    if not (math.isfinite(value) and holds):
        raise ValueError(f"{NAMES[type(normalizer)]}: {name} must be {wanted}, got {value}")
