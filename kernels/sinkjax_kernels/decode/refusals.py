"""What the kernels of decode attention refuse alike, each with the reason and what serves it."""

from collections.abc import Sequence
from typing import Any

from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import running
from sinkjax_kernels.decode.reference import check_scales

SHORTEST = 128
"""Slots: on fewer, `decode.reference` is as fast."""
LARGEST_HEAD = 256


def check_operands(
    query,
    key,
    value,
    *,
    query_positions=None,
    key_positions=None,
    sink_query=None,
    bias=None,
    mask=None,
    sinks=None,
    normalizer: normalizers.Normalizer,
    key_scale=None,
    value_scale=None,
    dtypes: Sequence[str],
    interpret: Any = False,
    **_: Any,
) -> None:
    """Raises for a call that reads the cache in one pass, slot by slot, and still is not built.

    Args:
        dtypes: of queries, and beside int8 of leaves, that are built.
        interpret: anything true also lets short caches pass, for tests.

    Raises:
        ValueError: shapes or options that do not go together.
        NotImplementedError: the rest.
    """
    B, T, N, H = query.shape
    K, C, Hv = value.shape[1:]
    if key.shape != (B, K, C, H) or value.shape[0] != B or N % K:
        raise ValueError(
            "query, key, value: expected [B, T, N, H], [B, K, S, H], [B, K, S, Hv] with N a multiple of "
            f"K, got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    for name, x, shapes in (
        ("query_positions", query_positions, ((B, T),)),
        ("key_positions", key_positions, ((B, 1, C), (B, K, C))),
        ("sink_query", sink_query, (query.shape,)),
        ("sinks", sinks, ((N,), (B, T, N))),
    ):
        if x is not None and x.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
    check_scales(key, value, key_scale, value_scale)
    if sinks is not None and not normalizer.takes_sinks:
        raise ValueError(f"sinks: only softmax takes sink logits, got normalizer {normalizer}")
    if not running.is_built(normalizer):
        raise NotImplementedError(
            f"normalizer: {normalizer} needs several passes over the keys; `decode.reference` serves it"
        )
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            raise NotImplementedError(f"{name}: is not read; `decode.reference` serves it")
    kinds = [str(x.dtype) for x in (query, key, value)]
    if kinds[0] not in dtypes or kinds[1] not in (*dtypes, "int8") or kinds[1] != kinds[2]:
        raise NotImplementedError(
            f"query, key, value: {' or '.join(dtypes)} queries and leaves of one type, one of these or "
            f"int8, are built, got {', '.join(kinds)}; `decode.reference` serves them"
        )
    if max(H, Hv) > LARGEST_HEAD:
        raise NotImplementedError(
            f"head size: at most {LARGEST_HEAD}, got {H} and {Hv}; `decode.reference` serves more"
        )
    if C < SHORTEST and not interpret:
        raise NotImplementedError(
            f"key: XLA is as fast on fewer than {SHORTEST} slots, got {C}; `decode.reference` serves it"
        )
