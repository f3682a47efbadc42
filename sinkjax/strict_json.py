"""Strict JSON: numbers that every reader knows, and dataclasses that refuse what does not fit."""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def plain(value: Any, not_finite: Callable[[float], Any] = lambda _: None) -> Any:
    """Data of which `json` makes strict JSON: there is no NaN and no infinity in it.

    Args:
      value: nested mappings, lists and tuples of numbers (numpy's and jax's too), texts, paths.
      not_finite: what stands for a number that is not finite; null unless told.

    Returns:
      The same as dicts with texts for keys, lists, texts and Python's numbers.

    Example:
      >>> plain({"loss": float("nan"), 3: (1, 2.5)})
      {'loss': None, '3': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, not_finite) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # arrays and their scalars
        return plain(value.tolist(), not_finite)
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else not_finite(value)


def to_json(config: Any) -> str:
    """A dataclass as indented JSON text; `from_json` reads it back to an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(cls: type[Config], text: str | Mapping[str, Any], *, name: str = "config") -> Config:
    """A dataclass from JSON text, or from the mapping that the text holds.

    Dataclasses may hold dataclasses, tuples of one type, literals, and plain types or unions of
    them. Keys that are left out take their defaults; an int stands for a float.

    Args:
      cls: the dataclass to build.
      text: what `to_json` wrote, or the parsed object.
      name: what to call the text in an error, usually its file.

    Returns:
      An instance of `cls`.

    Raises:
      ValueError: the text is not JSON, has keys that `cls` does not have, lacks one it needs, or
        holds a value of the wrong type or range; names the field with dots.
    """
    return _build(cls, parse(text, name) if isinstance(text, str) else text, name)


def parse(text: str, name: str) -> Any:
    """What a JSON text holds.

    Raises:
      ValueError: it is not JSON; begins with `name`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON, got {error}") from error


def _build(cls: Any, values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: expected a JSON object, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{name}: unknown keys {', '.join(unknown)}; expected some of {', '.join(fields)}"
        )
    for key, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if key not in values and not optional:
            got = ", ".join(values) or "none"
            raise ValueError(f"{name}: expected the key {key!r}, got {got}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(hints[key], value, f"{name}.{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint` has it: JSON knows no tuples and writes 1.0 as 1."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise ValueError(f"{name}: expected one of {choices}; got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    kinds = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value
