"""Losses of next-token prediction, in nats."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int, Num

from sinkjax.ops.precision import at_least_float32


def _nll_and_lse(logits: Array, targets: Array) -> tuple[Array, Array]:
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets: expected shape {logits.shape[:-1]}, got {targets.shape}")
    wide = at_least_float32(logits)
    lse = jax.nn.logsumexp(wide, axis=-1)
    # Not a lookup: a vocabulary that is cut over a mesh would be gathered for it, or refused.
    layout = jax.typeof(wide).sharding
    out = layout if AxisType.Explicit in layout.mesh.axis_types else None
    column = jax.lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1, out_sharding=out)
    chosen = jnp.where(column == targets[..., None], wide, 0).sum(axis=-1)
    # A target outside the vocabulary gives NaN, not the loss of some other token.
    known = (targets >= 0) & (targets < wide.shape[-1])
    return lse - jnp.where(known, chosen, jnp.nan), lse


def token_nll(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of each target.

    `logsumexp(logits) - logits[target]`.

    Why: perplexity along a stream and per-position curves want the loss of each token.

    Args:
      logits: `[..., V]`.
      targets: `[...]`, token ids.

    Returns:
      `[...]` in nats, float32 at least.

    Raises:
      ValueError: `targets` does not have the leading shape of `logits`.

    Example:
      >>> token_nll(jnp.zeros((1, 8)), jnp.array([5])).round(4).tolist()
      [2.0794...]
    """
    return _nll_and_lse(logits, targets)[0]


def cross_entropy(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    mask: Num[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy over the tokens that count, with an optional z-loss.

    `sum_t m_t (lse_t - logits_t[target_t] + z_loss * lse_t ** 2) / sum_t m_t`,
    `lse_t = logsumexp(logits_t)`.

    Why: the z-loss keeps the logits from drifting, which cross-entropy alone does not see, and
    bfloat16 heads stay stable; 1e-4 is usual.

    Args:
      logits: `[..., V]`.
      targets: `[...]`, token ids; anything where the mask is 0.
      mask: `[...]`, 1 or True for tokens that count, or their weights; all count by default.
      z_loss: weight of the squared log-partition.

    Returns:
      `(loss, aux)`: the mean in nats per token, and the scalars `nll` (without z-loss), `z_loss`
      (its weighted mean) and `tokens` (sum of the mask). Nothing masked in gives 0, not NaN.

    Raises:
      ValueError: shapes differ, or `z_loss` is negative.

    Source: Chowdhery et al., "PaLM", arXiv:2204.02311, section 5 (z-loss).
    """
    if isinstance(z_loss, int | float) and z_loss < 0:
        raise ValueError(f"z_loss: expected at least 0, got {z_loss}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask: expected shape {targets.shape}, got {mask.shape}")
    nll, lse = _nll_and_lse(logits, targets)
    weight = jnp.ones_like(nll) if mask is None else mask.astype(nll.dtype)
    tokens = weight.sum()
    share = weight / jnp.where(tokens > 0, tokens, 1)

    def mean(values: Array) -> Array:
        # Selected before the product: 0 * NaN is NaN, and a masked target may be anything.
        return jnp.sum(jnp.where(weight > 0, values, 0) * share)

    mean_nll = mean(nll)
    penalty = z_loss * mean(lse * lse)
    return mean_nll + penalty, {"nll": mean_nll, "z_loss": penalty, "tokens": tokens}
