"""Tokens that are kept whatever their score."""

from jaxtyping import Array, Bool, Int


def protect(
    positions: Int[Array, "B K S"],
    time: Int[Array, " B"],
    num_sink_tokens: int = 4,
    window: int = 0,
    pinned: Int[Array, "B n"] | None = None,
) -> Bool[Array, "B K S"]:
    r"""The sink tokens, the window, and tokens pinned by their position.

    $0 \le i < P$, or $t - W \le i$, or $i \in$ pinned, for the token at position i after t tokens.

    Args:
        positions: of what is held; an empty slot (−1) is never protected.
        time: tokens each row has taken.
        num_sink_tokens: P, the first tokens of the text.
        window: W, the last tokens of the text.
        pinned: positions of further tokens, for sinks found elsewhere in the text; −1 is none.

    Raises:
        ValueError: a negative number of sink tokens, or a negative window.
    """
    for name, number in (("num_sink_tokens", num_sink_tokens), ("window", window)):
        if number < 0:
            raise ValueError(f"{name}: expected at least 0, got {number}")
    safe = positions < num_sink_tokens
    safe |= time[:, None, None] - positions <= window
    if pinned is not None:
        safe |= (positions[..., None] == pinned[:, None, None, :]).any(-1)
    return safe & (positions >= 0)
