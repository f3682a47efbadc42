"""Pages of keys: what the best key of a page can reach, and the pages worth reading."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops.sparse.selection import ascending

_EXACT = jax.lax.Precision.HIGHEST


def page_bounds(
    query: Float[Array, "B N H"], low: Float[Array, "B K J H"], high: Float[Array, "B K J H"]
) -> Float[Array, "B N J"]:
    r"""$\sum_d \max(q_d\, l_{jd}, q_d\, h_{jd}) \ge \langle q, k \rangle$ for every key of page j.

    As two products, $\mathrm{relu}(q) \cdot h - \mathrm{relu}(-q) \cdot l$.

    Args:
        query: rotated as the keys are; head n reads key/value head n // (N/K).
        low, high: least and largest of each channel over the keys of a page.

    Returns:
        the bounds, float32 at least.

    Source: Tang et al. 2024 (Quest), arXiv 2406.10774, §3.3.
    """
    B, N, H = query.shape
    K = low.shape[1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.astype(dtype).reshape(B, K, N // K, H)

    def product(q, channel):
        return jnp.einsum("BKGH,BKJH->BKGJ", q, channel.astype(dtype), precision=_EXACT)

    bound = product(jax.nn.relu(grouped), high) - product(jax.nn.relu(-grouped), low)
    return bound.reshape(B, N, -1)


def best_pages(
    scores: Float[Array, "B N J"],
    held: Bool[Array, "B J"],
    newest: Int[Array, " B"],
    *,
    num_kv_heads: int,
    num_pages: int,
    num_recent_pages: int,
) -> Int[Array, "B K m"]:
    """The first page, the newest, then those in which some query head of the group scores highest.

    Args:
        scores: of pages, per query head. A group of G = N/K heads reads the same pages, chosen by the
            largest score of any of its heads.
        held: pages with a key in them.
        newest: the page of the query itself.
        num_pages: how many are chosen; m is this or J.
        num_recent_pages: so many last pages are in whatever their scores, and so is page 0.

    Returns:
        pages in ascending order, −1 where there are fewer.
    """
    B, N, J = scores.shape
    page = jnp.arange(J, dtype=jnp.int32)
    near = page > newest[:, None] - num_recent_pages
    forced = held & ((page == 0) | near) & (page <= newest[:, None])
    best = scores.reshape(B, num_kv_heads, -1, J).max(axis=2)
    least = jnp.finfo(scores.dtype).min
    best = jnp.where(jnp.isnan(best), least, jnp.maximum(best, least))
    rank = jnp.where(forced[:, None], jnp.inf, jnp.where(held[:, None], best, -jnp.inf))
    top, index = jax.lax.top_k(rank, min(num_pages, J))
    return ascending(index, top > -jnp.inf, J)
