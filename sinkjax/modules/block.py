"""A pre-norm transformer block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sinkjax.cache import LayerState, LayerView
from sinkjax.modules.attention import Attention, AttentionConfig
from sinkjax.modules.mlp import MLP
from sinkjax.modules.norm import RMSNorm
from sinkjax.modules.tap import tap


class Block(nnx.Module):
    """Attention and feed-forward layer, each behind a norm and beside a residual.

    x <- x + attention(norm(x));  x <- x + mlp(norm(x))

    Parameters: ``attention/...``, ``mlp/...``, ``attention_norm/scale``, ``mlp_norm/scale`` [D].
    Taps: ``residual_attention`` and ``residual_mlp``, the stream after each half.
    Statistics, beside those of the attention, over the two halves in this order:
    ``residual_norm`` [B, 2, T] the L2 norm, ``residual_top`` [B, 2, 3] the three largest |x| over
    (T, D), ``residual_median`` [B, 2] the median |x|; padding is left out of the last two.

    Args:
        config: of the attention; its norm_epsilon, init_std and dtypes hold for the block.
        mlp_dim: F, width inside the feed-forward layer.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: AttentionConfig, mlp_dim: int, rngs: nnx.Rngs):
        self.config = config
        D, epsilon, param_dtype = config.model_dim, config.norm_epsilon, config.param_dtype
        self.attention_norm = RMSNorm(D, epsilon=epsilon, param_dtype=param_dtype)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(D, epsilon=epsilon, param_dtype=param_dtype)
        self.mlp = MLP(
            D,
            mlp_dim,
            init_std=config.init_std,
            dtype=config.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        cache: LayerView | None = None,
        statistics: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerState | None, dict[str, Array]]:
        """As `Attention.__call__`, over the whole block; a cache takes residual statistics only."""
        out, state, reduced = self.attention(
            self.attention_norm(x),
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            statistics=statistics and cache is None,
        )
        middle = x + out
        tap(self, "residual_attention", middle)
        end = middle + self.mlp(self.mlp_norm(middle))
        tap(self, "residual_mlp", end)
        if statistics:
            valid = jnp.ones(x.shape[:2], bool)
            if positions is not None:
                valid &= positions >= 0
            if segment_ids is not None:
                valid &= segment_ids != 0
            reduced = reduced | _residual_statistics(middle, end, valid)
        return end, state, reduced


def _residual_statistics(
    middle: Float[Array, "B T D"], end: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> dict[str, Array]:
    stream = jax.lax.stop_gradient(jnp.stack([middle, end], axis=1)).astype(jnp.float32)
    magnitude = jnp.where(valid[:, None, :, None], jnp.abs(stream), jnp.nan)
    flat = magnitude.reshape(*stream.shape[:2], -1)  # [B, 2, T*D]
    return {
        "residual_norm": jnp.linalg.norm(stream, axis=-1),
        "residual_top": jax.lax.top_k(jnp.nan_to_num(flat), 3)[0],
        "residual_median": jnp.nanmedian(flat, axis=-1),
    }
