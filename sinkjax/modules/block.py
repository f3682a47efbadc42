"""A transformer block: two halves, each with norms and a residual."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sinkjax.cache import LayerView
from sinkjax.modules.attention import Attention, AttentionConfig
from sinkjax.modules.mlp import MLP, MLPVariant
from sinkjax.modules.moe import MoE
from sinkjax.modules.norm import make_norm
from sinkjax.modules.tap import tap
from sinkjax.sharding import ROWS, laid_out_by_compiler


class Block(nnx.Module):
    """Attention and feed-forward layer, each beside a residual, with norms where the config says.

    f is attention, then mlp. ``config.norm_placement``:
    ``"pre"``: x <- x + f(norm(x)); ``"post"``: x <- norm(x + f(x));
    ``"sandwich"``: x <- x + norm_out(f(norm(x)))

    One wants the choice because it decides whether massive activations show in the stream: a norm
    after the sum divides them out again. Sinks form with each of the three.

    Parameters: ``attention/...``, ``mlp/...``, ``attention_norm/...`` and ``mlp_norm/...``, of which
    ``scale`` [D] in the plain norm; sandwiched also ``attention_norm_out`` and ``mlp_norm_out``.
    ``mlp`` is an `MLP`, or with experts an `MoE`.
    Taps: ``residual_attention`` and ``residual_mlp``, the stream after each half.
    Statistics, beside those of the attention, over the two halves in this order:
    ``residual_norm`` [B, 2, T] the L2 norm, ``residual_top`` [B, 2, 3] the three largest |x| over
    (T, D), ``residual_median`` [B, 2] the median |x|; padding is left out of the last two. With experts
    also ``expert_share`` [B, E], without padding.

    Args:
        config: of the attention; its norms, init_std and dtypes hold for the block.
        mlp_dim: F, width inside the feed-forward layer, or inside one expert.
        rngs: source of the initial parameters.
        mlp: what the feed-forward layer is.

    Source: post Vaswani et al., arXiv 1706.03762; pre Xiong et al., arXiv 2002.04745; sandwich Ding
        et al., arXiv 2105.13290.
    """

    def __init__(
        self,
        config: AttentionConfig,
        mlp_dim: int,
        rngs: nnx.Rngs,
        mlp: MLPVariant = MLPVariant(),  # noqa: B008 - frozen
    ):
        self.config = config
        D = config.model_dim
        self.attention_norm = make_norm(D, config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = make_norm(D, config, rngs)
        mlp.check()
        rest: dict[str, Any] = dict(
            init_std=config.init_std,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.mlp = (
            MoE(D, mlp_dim, mlp, **rest)
            if mlp.num_experts
            else MLP(D, mlp_dim, activation=mlp.mlp_activation, **rest)
        )
        if config.norm_placement == "sandwich":
            self.attention_norm_out = make_norm(D, config, rngs)
            self.mlp_norm_out = make_norm(D, config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        cache: LayerView | None = None,
        statistics: bool = False,
        penalties: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Any | None, dict[str, Array]]:
        """As `Attention.__call__`, over the whole block; a cache takes no statistics of attention.

        Names in ``penalties`` that are the router's come back among the statistics.
        """
        is_pre = self.config.norm_placement != "post"
        valid = None
        if statistics or penalties:
            valid = jnp.ones(x.shape[:2], bool)
            if positions is not None:
                valid &= positions >= 0
            if segment_ids is not None:
                valid &= segment_ids != 0
        out, state, reduced = self.attention(
            self.attention_norm(x) if is_pre else x,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            statistics=statistics and cache is None,
        )
        if self.config.norm_placement == "sandwich":
            out = self.attention_norm_out(out)
        middle = x + out if is_pre else self.attention_norm(x + out)
        tap(self, "residual_attention", middle)
        inside = self.mlp_norm(middle) if is_pre else middle
        if isinstance(self.mlp, MoE):
            out, found = self.mlp(inside, mask=valid, statistics=statistics, penalties=penalties)
            reduced = reduced | found
        else:
            out = self.mlp(inside)
        if self.config.norm_placement == "sandwich":
            out = self.mlp_norm_out(out)
        end = middle + out if is_pre else self.mlp_norm(middle + out)
        tap(self, "residual_mlp", end)
        if statistics and valid is not None:
            reduced = reduced | laid_out_by_compiler(
                _residual_statistics, PartitionSpec(ROWS), middle, end, valid
            )
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
