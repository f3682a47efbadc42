"""Masks as ranges: what a kernel with static tiles can know of a `Visibility` before it runs.

Query t sees the keys (t − W, t] and the sink tokens [0, P): two ranges in closed form, so there is no
mask array, no table, and nothing that grows with T · S.
"""

import dataclasses

import numpy as np
from jax.core import Tracer

from sinkjax_kernels.masks import Visibility


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Causal attention at positions 0, 1, 2, …: a window and sink tokens.

    Args:
        window: keys that a query sees back, itself included; None is all of them.
        num_sink_tokens: keys 0 … P − 1 are seen by every query that is not before them.
    """

    window: int | None = None
    num_sink_tokens: int = 0

    def within(self, length: int) -> "Ranges":
        """The same mask of `length` queries, in one spelling: no window that hides nothing."""
        if self.window is None or self.window + self.num_sink_tokens >= length:
            return Ranges()
        return self

    def pairs(self, length: int) -> int:
        """Visible pairs of `length` queries."""
        same = self.within(length)
        if same.window is None:
            return length * (length + 1) // 2
        W, P = same.window, same.num_sink_tokens
        # Sink token p is outside the window of queries p + W and later.
        return W * (W + 1) // 2 + (length - W) * W + sum(length - W - p for p in range(P))


def ranges_of(visibility: Visibility) -> Ranges:
    """The ranges of a mask that has some.

    Positions have to be known while tracing, which those that `masks.build` makes under `jax.jit`
    are not; a caller that knows them hands `Ranges` to the kernel itself.

    Raises:
        NotImplementedError: it has none, with the reason and what serves it.
    """
    v = visibility
    other = "; `flash.xla` serves it"
    if v.query_segment_ids is not None:
        raise NotImplementedError(f"ranges: segments are not built{other}")
    if v.query_lengths is not None or v.key_lengths is not None:
        raise NotImplementedError(f"ranges: sequence lengths are not built{other}")
    if v.excludes_self:
        raise NotImplementedError(f"ranges: a mask without the query's own key is not built{other}")
    if not v.is_causal:
        raise NotImplementedError(f"ranges: attention that is not causal is not built{other}")
    queries = _known("query_positions", v.query_positions)
    keys = _known("key_positions", v.key_positions)
    for name, places in (("query_positions", queries), ("key_positions", keys)):
        if not (places == np.arange(places.shape[-1])).all():
            raise NotImplementedError(f"ranges: {name} other than 0, 1, 2, … are not built{other}")
    if v.left is None:  # a bound on later keys says nothing in causal attention
        return Ranges()
    if v.key_is_sink is None:
        return Ranges(window=v.left + 1)
    flags = _known("key_is_sink", v.key_is_sink)
    number = int(flags.reshape(-1, flags.shape[-1])[0].sum())
    if not (flags == (np.arange(flags.shape[-1]) < number)).all():
        raise NotImplementedError(f"ranges: sink tokens other than the first are not built{other}")
    return Ranges(window=v.left + 1, num_sink_tokens=number)


def _known(name: str, x) -> np.ndarray:
    if isinstance(x, Tracer):
        raise NotImplementedError(
            f"ranges: {name} is traced, so its values are not known; give `ranges`, or `flash.xla` "
            "serves it"
        )
    return np.asarray(x)
