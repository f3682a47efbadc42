"""Which implementation runs: by name, by what it can serve, and by the platform compiled for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sinkjax_kernels.devices import can_compile, check_device


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute a function.

    Args:
        run: the function.
        check: takes the same arguments and raises `NotImplementedError`, with the reason, for a call
            that `run` cannot serve; None serves all. Nothing is traced for it.
        platform: the only one it compiles for, as JAX names platforms; None is any.
    """

    run: Callable[..., Any]
    check: Callable[..., None] | None = None
    platform: str | None = None


Table = Mapping[str, Implementation]
"""Implementations by name, in order of preference."""


def dispatch(
    table: Table,
    implementation: str | Sequence[str] | None,
    arrays: Mapping[str, Any],
    static: Mapping[str, Any],
) -> Any:
    """Run the first implementation that serves the call, on each platform its own.

    Why `jax.lax.platform_dependent`: the platform is only known when the program is compiled, which
    may be ahead of time and for another machine than this one. To trace a kernel takes a second or so:
    where no implementation is named, it is spared on machines without that platform's compiler,
    and what they export for it is the portable implementation.

    Args:
        implementation: a name, several to be tried in order, or None for the whole table.
        arrays: operands by name, pytrees of arrays.
        static: everything else by name.

    Raises:
        ValueError: a name that is not in the table.
        NotImplementedError: the one named implementation cannot serve the call.
        ExceptionGroup: none of several can; it holds every reason.
    """
    names = _names(table, implementation)
    options = {**arrays, **static}
    kinds = {table[name].platform for name in names} - {None}
    if implementation is None:
        kinds = {kind for kind in kinds if can_compile(kind)}
    portable = [name for name in names if table[name].platform is None]
    if not portable:
        return table[_first(table, names, options)].run(**options)
    default = _first(table, portable, options)
    chosen = {}
    for kind in kinds:
        able = [name for name in names if table[name].platform in (None, kind)]
        name = _first(table, able, options)
        if name != default:
            chosen[kind] = name
    if not chosen:
        return table[default].run(**options)

    def branch(name):
        return lambda arrays: table[name].run(**arrays, **static)

    branches = {kind: branch(name) for kind, name in chosen.items()}
    return jax.lax.platform_dependent(dict(arrays), default=branch(default), **branches)


def choose(
    table: Table,
    implementation: str | Sequence[str] | None,
    platform: str,
    options: Mapping[str, Any],
) -> str:
    """Name of the implementation that `dispatch` runs on a platform; raises as it does."""
    names = _names(table, implementation)
    bound = all(table[name].platform is not None for name in names)
    able = [name for name in names if bound or table[name].platform in (None, platform)]
    return _first(table, able, options)


def _names(table: Table, implementation: str | Sequence[str] | None) -> list[str]:
    if implementation is None:
        return list(table)
    names = [implementation] if isinstance(implementation, str) else list(implementation)
    if not names or not set(names) <= set(table):
        raise ValueError(
            f"implementation: expected one of {list(table)}, or several, got {implementation!r}"
        )
    return names


def _first(table: Table, names: Sequence[str], options: Mapping) -> str:
    """The first of some implementations that serves a call."""
    reasons = []
    for name in names:
        known = table[name]
        try:
            if known.platform is not None:
                check_device(known.platform)
            if known.check is not None:
                known.check(**options)
            return name
        except NotImplementedError as reason:
            if len(names) == 1:
                raise
            reasons.append(NotImplementedError(f"{name}: {reason}"))
    raise ExceptionGroup("attention: no implementation serves this call", reasons)
