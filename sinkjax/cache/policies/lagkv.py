"""Keep what differs most from the text that follows it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence
from sinkjax.cache.policies.order import in_text, places


@dataclasses.dataclass(frozen=True)
class LagKV:
    r"""Spread over channels after scaling by the next chunk's range.

    The tokens behind the sinks form chunks of `lag`, in the order of the text. Within chunk p, for
    keys and values alike, $s_i = \mathrm{softmax}_i\,\mathrm{std}_h
    \frac{x_{ih} - \min_{p+1} x_h}{\max_{p+1} x_h - \min_{p+1} x_h}$. The mean of both is turned into a
    rank from 0 to (lag − 1) / lag, so that every chunk loses as many tokens.

    Where there is no following chunk, the score is above 1 and ascends with the position; the first
    tokens score ∞. Equal ranks in different chunks are ties, of which `keep` keeps the later slot.

    Args:
        num_sink_tokens: tokens at the start of the text that are not ranked.
        lag: tokens per chunk, at least 2.
        cross_chunks: compare across chunks by $s_i$ itself instead of the rank.

    Source: Liang et al. 2025, arXiv 2504.04704; defaults and the unbiased std of kvpress,
    lagkv_press.py.
    """

    num_sink_tokens: int = 4
    lag: int = 128
    cross_chunks: bool = False
    num_queries = 0
    discount = None

    def __post_init__(self) -> None:
        for name, least in (("num_sink_tokens", 0), ("lag", 2)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"LagKV.{name}: expected at least {least}, got {got}")

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Ranks within chunks; recency for the tail, ∞ for the first tokens."""
        ranked = evidence.held & (evidence.positions >= self.num_sink_tokens)
        place = places(evidence.positions, ranked)
        count = ranked.sum(-1, keepdims=True)
        S = place.shape[-1]
        dtype = jnp.promote_types(evidence.key.dtype, jnp.float32)
        index = jnp.arange(S, dtype=jnp.int32)
        scores = jnp.broadcast_to(1 + (index + 1).astype(dtype) / (count + 1), place.shape)
        whole = S // self.lag
        if whole >= 2:
            order = in_text(jnp.broadcast_to(index, place.shape), place)
            scored = self._chunks(evidence, order, whole, dtype)
            length = scored.shape[-1]
            followed = (index[:length] // self.lag + 2) * self.lag <= count
            scored = jnp.where(followed, scored, scores[..., :length])
            scores = jnp.concatenate([scored, scores[..., length:]], axis=-1)
        scores = jnp.take_along_axis(scores, jnp.minimum(place, S - 1), axis=-1)
        return jnp.where(ranked, scores, jnp.inf)

    def _chunks(self, evidence: Evidence, order: Array, whole: int, dtype) -> Array:
        """[B, K, (whole − 1)·lag] scores in the order of the text."""
        mean = jnp.zeros((), dtype)
        for leaf in (evidence.key, evidence.value):
            x = jnp.take_along_axis(leaf.astype(dtype), order[..., None], axis=2)
            B, K, _, H = x.shape
            x = x[:, :, : whole * self.lag].reshape(B, K, whole, self.lag, H)
            low, high = x[:, :, 1:].min(3, keepdims=True), x[:, :, 1:].max(3, keepdims=True)
            extent = jnp.where(high > low, high - low, 1)
            spread = ((x[:, :, :-1] - low) / extent).std(-1, ddof=1)
            mean = mean + jax.nn.softmax(spread, axis=-1) / 2
        if not self.cross_chunks:
            a, b = mean[..., :, None], mean[..., None, :]
            earlier = jnp.tri(self.lag, k=-1, dtype=bool)
            mean = ((b < a) | ((b == a) & earlier)).sum(-1).astype(dtype) / self.lag
        return mean.reshape(*mean.shape[:2], -1)
