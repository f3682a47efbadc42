"""What a pattern is, and `select`, which applies one."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from sinkjax.ops.sparse.prompt import Prompt, to_blocks
from sinkjax.ops.sparse.selection import Selection


@runtime_checkable
class Pattern(Protocol):
    """Which pairs of a prompt a head computes; frozen and hashable."""

    @property
    def block_size(self) -> int:
        """Tokens per block of queries and of keys."""
        ...

    def choose(self, prompt: Prompt) -> Selection:
        """The pattern on a prompt that is cut into blocks."""
        ...


def select(
    pattern: Pattern,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    *,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
) -> Selection:
    """The blocks that `pattern` chooses for these queries, for `sparse_attention`.

    Whatever the pattern, the first block of keys, where the sink is, and the block of the query
    itself are chosen before all others.

    Args:
        query, key: rotated; keys as they lie in a cache, `[B, K, S, H]`, the key in slot s at
            position s.
        query_positions: consecutive within a row but for padding, −1, which chooses nothing. None:
            the last T of S.
        key_positions: the slot's own index, or −1 where it is empty. None: no slot is.
        scale, logits_soft_cap: of the attention that is to come; the scale is 1/√H by default.

    Returns:
        a `Selection` for T/b blocks of queries, counted from the first of the call.

    Raises:
        ValueError: heads that do not fit, or more queries than keys without positions.
    """
    return pattern.choose(
        to_blocks(
            query, key, query_positions, key_positions, scale, logits_soft_cap, pattern.block_size
        )
    )


def expect(pattern: Any, name: str, least: float, most: float | None = None) -> None:
    """Refuse a field of a pattern that is no number of the kind it has, or out of its range.

    Raises:
        ValueError: names the pattern, the field, what was expected and what came.
    """
    value = getattr(pattern, name)
    if most is None:
        holds, wanted = isinstance(value, int), f"an integer of at least {least}"
    else:
        holds, wanted = isinstance(value, int | float), f"a number from {least} to {most}"
    if isinstance(value, bool) or not holds or not value >= least:
        holds = False
    if not holds or (most is not None and value > most):
        raise ValueError(f"{type(pattern).__name__}.{name}: expected {wanted}, got {value!r}")


LEAST_BLOCKS = 3
"""The least budget: the block of the sink and two of the queries themselves."""
