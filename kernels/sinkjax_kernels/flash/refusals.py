"""What the kernels for accelerators refuse alike, each with the reason and what serves it."""

from collections.abc import Sequence
from typing import Any

SHORTEST = 128
"""Queries of a tile: for fewer, `flash.xla` is as fast."""


def check_operands(
    query,
    key,
    value,
    bias,
    mask,
    normalizer_params,
    *,
    dtypes: Sequence[str],
    interpret: Any = False,
) -> None:
    """Raises for operands of kernels that read whole tiles of query, key and value, and nothing else.

    Args:
        dtypes: that are built; all three operands have the same.
        interpret: anything true also lets short calls pass, for tests.

    Raises:
        ValueError: shapes that do not go together.
        NotImplementedError: the rest.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if key.shape != (B, S, K, H) or value.shape[:3] != (B, S, K) or N % K:
        raise ValueError(
            f"query, key, value: expected [B, T, N, H], [B, S, K, H], [B, S, K, Hv] with N a multiple "
            f"of K, got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if T < SHORTEST and not interpret:
        raise NotImplementedError(
            f"query: {T} queries are less than a tile of {SHORTEST}, `flash.xla` is as fast there"
        )
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise NotImplementedError(f"{name}: arrays are not read; `flash.xla` serves them")
    if normalizer_params:
        raise NotImplementedError(
            f"normalizer_params: learned leaves ({', '.join(normalizer_params)}) are not built; "
            "`flash.xla` serves them"
        )
    given = [str(x.dtype) for x in (query, key, value)]
    if len(set(given)) > 1 or given[0] not in dtypes:
        raise NotImplementedError(
            f"query, key, value: all {' or all '.join(dtypes)} are built, got {', '.join(given)}; "
            "`flash.xla` serves them"
        )
