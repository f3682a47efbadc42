"""Keep what the last queries agree on."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence, last_weights
from sinkjax.cache.policies.order import in_text, places


@dataclasses.dataclass(frozen=True)
class SnapKV:
    """Mean attention of the last w queries, smoothed over neighbouring tokens, mean over the group.

    The tokens of the observation window itself (from the oldest of those queries on) are not ranked:
    they score ∞, and neighbours' smoothing meets zeros in their place, as it does before the start of
    the text. Neighbours are those in the order of the text among the tokens still held.

    The paper's budget for a layer is the capacity; `budgets.Pyramid` makes PyramidKV of it.

    Args:
        num_queries: w, at least 1.
        kernel: tokens in the moving average, odd.

    Source: Li et al. 2024, arXiv 2404.14469; sizes and the mean over the group of query heads as
    in kvpress, snapkv_press.py.
    """

    num_queries: int = 64
    kernel: int = 5
    discount = None

    def __post_init__(self) -> None:
        if self.num_queries < 1:
            raise ValueError(f"SnapKV.num_queries: expected at least 1, got {self.num_queries}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"SnapKV.kernel: expected an odd positive number, got {self.kernel}")

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Smoothed votes, ∞ for the window."""
        weights = last_weights(evidence, "SnapKV")
        at = evidence.query_positions
        voters = jnp.maximum((at >= 0).sum(-1), 1)
        votes = weights.sum(-2).mean(2) / voters[:, None, None]
        late = jnp.iinfo(jnp.int32).max
        oldest = jnp.where(at >= 0, at, late).min(-1)[:, None, None]
        ranked = evidence.held & (evidence.positions < oldest)
        place = places(evidence.positions, ranked)
        side = self.kernel // 2
        padded = jnp.pad(in_text(votes, place), ((0, 0), (0, 0), (side, side)))
        S = votes.shape[-1]
        smooth = sum(padded[..., i : i + S] for i in range(self.kernel)) / self.kernel
        smooth = jnp.take_along_axis(smooth, jnp.minimum(place, S - 1), axis=-1)
        return jnp.where(ranked, smooth, jnp.inf)
