"""Masks as ranges: what a kernel with static tiles can know of a `Visibility` before it runs.

Query t sees the keys (t − W, t] and the sink tokens [0, P), in packed rows those of its segment: two
ranges in closed form, so there is no mask array, no table of blocks, and nothing that grows with T · S.
"""

import dataclasses

from sinkjax_kernels.masks import Visibility


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Causal attention over consecutive positions: a window and sink tokens.

    Args:
        window: keys that a query sees back, itself included; None is all of them.
        num_sink_tokens: keys 0 … P − 1 are seen by every query that is not before them.
        offset: query t is key `offset + t`.
        has_segments: rows are packed. Query and key have one array of segment ids, equal ids are
            adjacent, and sink tokens are the first of their segment.
    """

    window: int | None = None
    num_sink_tokens: int = 0
    offset: int = 0
    has_segments: bool = False

    def within(self, length: int) -> "Ranges":
        """The same mask of `length` queries, in one spelling: no window that hides nothing."""
        if self.window is None or self.window + self.num_sink_tokens >= self.offset + length:
            return dataclasses.replace(self, window=None, num_sink_tokens=0)
        return self

    def pairs(self, length: int) -> int:
        """Visible pairs of `length` queries, all of one segment."""
        if self.offset:
            whole = dataclasses.replace(self, offset=0)
            return whole.pairs(self.offset + length) - whole.pairs(self.offset)
        same = self.within(length)
        if same.window is None:
            return length * (length + 1) // 2
        W, P = same.window, same.num_sink_tokens
        # Sink token p is outside the window of queries p + W and later.
        return W * (W + 1) // 2 + (length - W) * W + sum(length - W - p for p in range(P))


def ranges_of(visibility: Visibility) -> Ranges:
    """The ranges of a mask that has some, from what is known of it while tracing.

    Raises:
        NotImplementedError: it has none, with the reason and what serves it.
    """
    v = visibility
    other = "; `flash.xla` serves it"
    if v.query_lengths is not None or v.key_lengths is not None:
        raise NotImplementedError(f"ranges: sequence lengths are not built{other}")
    if v.excludes_self:
        raise NotImplementedError(f"ranges: a mask without the query's own key is not built{other}")
    if not v.is_causal:
        raise NotImplementedError(f"ranges: attention that is not causal is not built{other}")
    if v.query_start is None or v.key_start is None:
        name = "query_positions" if v.query_start is None else "key_positions"
        raise NotImplementedError(
            f"ranges: {name} are not known to be consecutive; leave them out, give a NumPy array, or "
            "`flash.xla` serves them"
        )
    offset = v.query_start - v.key_start
    if offset < 0:
        raise NotImplementedError(
            f"ranges: queries {-offset} before the first key are not built{other}"
        )
    has_segments = v.query_segment_ids is not None
    if has_segments and (offset or not v.same_segments):
        raise NotImplementedError(
            "ranges: segments are built where query_segment_ids and key_segment_ids are one array "
            f"and no position is shifted{other}"
        )
    plain = Ranges(offset=offset, has_segments=has_segments)
    if v.left is None:  # a bound on later keys says nothing in causal attention
        return plain
    if v.num_sink_tokens is None:
        raise NotImplementedError(f"ranges: sink tokens by `key_is_sink` are not built{other}")
    # Sink tokens are keys at positions below P, or in segments at indices below it.
    number = v.num_sink_tokens if has_segments else max(0, v.num_sink_tokens - v.key_start)
    return dataclasses.replace(plain, window=v.left + 1, num_sink_tokens=number)
