"""Descriptions of caches as JSON: the name of a frozen dataclass and its fields, nested."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

import sinkjax.cache  # noqa: F401  whose modules hold what is known

_CLASS = "class"
_OWN = re.compile(r"sinkjax\.cache(\.|$)")


def plain(value: Any) -> Any:
    """A description as what JSON knows; `from_plain` reads it back to an equal one.

    Raises:
        ValueError: it holds something that is neither a dataclass, a tuple, a number nor a text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        return {_CLASS: type(value).__name__} | fields
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"description: expected dataclasses, tuples, numbers and texts in a cache that is saved, "
        f"got {value!r}"
    )


def from_plain(value: Any, more: Sequence[type] = ()) -> Any:
    """A description from what `plain` gave.

    Args:
        value: a mapping with the name of a class and its fields.
        more: classes besides those of `sinkjax.cache`.

    Raises:
        ValueError: a class that is not known, or fields that it refuses.
    """
    if isinstance(value, list):
        return tuple(from_plain(item, more) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: from_plain(item, more) for name, item in value.items()}
    name, known = fields.pop(_CLASS), _known(more)
    if name not in known:
        raise ValueError(
            f"descriptions: the cache was made with a {name}, which is none of sinkjax's; "
            f"give its class"
        )
    try:
        return known[name](**fields)
    except TypeError as error:  # a field that another version had
        raise ValueError(f"descriptions: {error}") from error


def _known(more: Sequence[type]) -> dict[str, type]:
    """Dataclasses by name: those of `sinkjax.cache` and of all modules in it, which it has loaded."""
    modules = [sys.modules[name] for name in sorted(sys.modules) if _OWN.match(name)]
    classes = [cls for module in modules for cls in vars(module).values()] + [*more]
    return {
        cls.__name__: cls
        for cls in classes
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }
