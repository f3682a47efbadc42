"""What the last queries of a prompt look at: the sample from which patterns guess the rest."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.ops.sparse.prompt import Prompt

_EXACT = jax.lax.Precision.HIGHEST


def last_queries(prompt: Prompt, count: int) -> tuple[Float[Array, "B n N H"], Int[Array, "B n"]]:
    """The last `count` queries of each row, oldest first, and their positions; −1 where it has fewer."""
    order = jnp.argsort(prompt.query_positions, axis=1)[:, -count:]
    positions = jnp.take_along_axis(prompt.query_positions, order, axis=1)
    return jnp.take_along_axis(prompt.query, order[..., None, None], axis=1), positions


def column_and_diagonal_sums(
    prompt: Prompt, query: Float[Array, "B n N H"], positions: Int[Array, "B n"]
) -> tuple[Float[Array, "B N S"], Float[Array, "B N S"]]:
    r"""$c_j = \sum_t p_{tj}$ and $d_r = \sum_t p_{t,\,t-r}$ with p the causal softmax of these queries.

    One key/value head after the other: memory is G·n·S.
    """
    B, n, N, H = query.shape
    K, S = prompt.key.shape[1:3]
    slot = jnp.arange(S, dtype=jnp.int32)
    seen = prompt.exists[:, None, :] & (slot <= positions[:, :, None])
    mirror = positions[:, :, None] - slot  # the key that is r back, for r in the place of a slot
    behind = (mirror >= 0)[:, None]
    mirror = jnp.maximum(mirror, 0)[:, None]
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def sums(operands):
        heads, key = operands  # [B, G, n, H], [B, S, H]
        products = jnp.einsum(
            "BGTH,BSH->BGTS", heads, key, precision=_EXACT, preferred_element_type=dtype
        )
        logits = jnp.where(seen[:, None], prompt.logits(products), -jnp.inf)
        top = logits.max(axis=-1, keepdims=True)
        terms = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
        total = terms.sum(axis=-1, keepdims=True)
        weights = terms / jnp.where(total == 0, 1, total)
        back = jnp.take_along_axis(weights, jnp.broadcast_to(mirror, weights.shape), axis=-1)
        return weights.sum(axis=2), jnp.where(behind, back, 0).sum(axis=2)

    grouped = query.reshape(B, n, K, N // K, H).transpose(2, 0, 3, 1, 4)
    columns, diagonals = jax.lax.map(sums, (grouped, prompt.key.swapaxes(0, 1)))
    return tuple(x.swapaxes(0, 1).reshape(B, N, S) for x in (columns, diagonals))
