"""Which heads look past the sinks and the latest tokens: read off the attention, forward only."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sinkjax.diagnose.capture import capturable, run
from sinkjax.models import Decoder, DecoderConfig
from sinkjax.modules import AttentionConfig
from sinkjax.ops.attention import dot_product_attention
from sinkjax.ops.forgetting import decay_bias
from sinkjax.ops.positions import alibi_decay, alibi_slopes, index_within_segment
from sinkjax_kernels.normalizers import Softmax, Softmax1, SoftmaxN


def streaming_config(
    config: AttentionConfig, num_sink_tokens: int, window: int
) -> AttentionConfig | None:
    """The layer with all of its heads streaming, or None where it always does so.

    A layer whose own window is no longer than the streaming heads' keeps its mask in every cache:
    there is nothing to decide about its heads.

    Args:
        config: of the layer.
        num_sink_tokens, window: P and W of a streaming head.
    """
    if config.window is not None and config.window <= window:
        return None
    return dataclasses.replace(config, num_sink_tokens=num_sink_tokens, window=window)


def outside_mass(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    num_sink_tokens: int = 64,
    window: int = 256,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    where: Bool[Array | np.ndarray, "B T"] | None = None,
    batch_size: int = 1,
) -> Float[np.ndarray, "L K"]:
    r"""Mean attention mass that falls outside the first P and the last W tokens.

    $$ m_t = \sum_{j \ge P,\; j \le t - W} w_{tj}
           = \Big(1 - e^{\mathrm{LSE}_t^{P,W} - \mathrm{LSE}_t}\Big) \sum_j w_{tj} $$

    over the queries t ≥ P + W, the first that have anything outside; of the query heads of a
    key/value head the largest. One wants it because a few texts are enough, without a gradient and
    in memory linear in T. It is mass, not use: a head may look far away for nothing, which the gates
    of `train_head_gates` tell apart.

    Args:
        model: the decoder, scanned or not.
        tokens: [B, T] ids with T > P + W; rows as the model was trained on.
        num_sink_tokens, window: P and W of a streaming head.
        positions, segment_ids: as the model takes them.
        where: queries that count, of those late enough; None: all. The answers of `Passkeys`
            (`loss_mask`) ask for what is needed there.
        batch_size: rows at a time.

    Returns:
        [L, K] between 0 and 1, for `HeadPlan.from_scores`; NaN in a layer whose own window is no
        longer than W.

    Raises:
        ValueError: no query is late enough; or the layers have no log-sum-exp of plain logits: a
            normaliser other than softmax, softmax1 and softmax_n, a forget gate, a distance bias.

    Source: the forward-only classification of mlx-lm (pull request 1522) and, per layer, SimLayerKV
        (Zhang et al. 2024, arXiv 2410.13846), with the mass exact instead of sampled.
    """
    layer = model.config.layer(0)
    if not isinstance(layer.described_normalizer, Softmax | Softmax1 | SoftmaxN):
        raise ValueError(
            "normalizer: expected softmax, softmax1 or softmax_n, whose log-sum-exps give the mass, "
            f"got {layer.normalizer!r}; train_head_gates takes every normaliser"
        )
    for name in ("forget_gate", "distance_bias"):
        if getattr(layer, name):
            raise ValueError(
                f"{name}: expected none here, got {getattr(layer, name)}; "
                "train_head_gates takes every layer"
            )
    ids = np.asarray(tokens)
    B, T = ids.shape
    given = {"positions": positions, "segment_ids": segment_ids, "where": where}
    graphdef, state = nnx.split(capturable(model))
    config = model.config
    total, count = np.zeros((config.num_layers, config.num_heads)), 0
    for begin in range(0, B, batch_size):
        rows = {
            name: None if x is None else jnp.asarray(x)[begin : begin + batch_size]
            for name, x in given.items()
        }
        part = jnp.asarray(ids[begin : begin + batch_size])
        found, queries = _sums(graphdef, num_sink_tokens, window, state, part, **rows)
        total, count = total + np.asarray(found, np.float64), count + int(queries)
    if count == 0:
        raise ValueError(
            f"tokens: expected some query at position {num_sink_tokens + window} "
            f"(num_sink_tokens + window) or later, got rows of {T} tokens"
        )
    groups = total.reshape(config.num_layers, config.num_kv_heads, -1)
    return groups.max(axis=-1) / count


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(graphdef, num_sink_tokens, window, state, tokens, *, positions, segment_ids, where):
    """The mass summed over the queries that count, [L, N], and the number of those."""
    model = nnx.merge(graphdef, state)
    found = run(model, tokens, positions=positions, segment_ids=segment_ids)
    index = jnp.arange(tokens.shape[1])[None] if positions is None else positions
    if positions is None and segment_ids is not None:
        index = index_within_segment(segment_ids)
    late = jnp.broadcast_to(index >= num_sink_tokens + window, tokens.shape)
    if segment_ids is not None:
        late &= segment_ids != 0
    if where is not None:
        late &= where
    config: DecoderConfig = model.config
    sums = []
    for layer, trained in enumerate(map(config.layer, range(config.num_layers))):
        streaming = streaming_config(trained, num_sink_tokens, window)
        if streaming is None:
            sums.append(jnp.full((config.num_heads,), jnp.nan))
            continue
        query, key = found.query_rotated[layer], found.key_rotated[layer]
        # A streaming head may keep sink tokens that the trained window hides. Counting them on both
        # sides leaves what only the trained mask shows.
        P = trained.num_sink_tokens if trained.window is None else num_sink_tokens
        either = dataclasses.replace(trained, num_sink_tokens=max(P, trained.num_sink_tokens))
        over = {
            mask: _log_sum_exp(mask, query, key, index, positions, segment_ids)
            for mask in dict.fromkeys((trained, either, streaming))
        }
        lse, all_keys, kept = over[trained], over[either], over[streaming]
        share = jnp.exp(all_keys - lse) * -jnp.expm1(jnp.minimum(kept - all_keys, 0))
        # Sink logits and whatever else is in the denominator have taken their part already.
        outside = share * found.statistics["row_mass"][layer].swapaxes(1, 2)
        sums.append(jnp.where(late[..., None], outside, 0).sum((0, 1)))
    return jnp.stack(sums), late.sum()


def _log_sum_exp(
    mask: AttentionConfig, query, key, index, positions, segment_ids
) -> Float[Array, "B T N"]:
    """Over the keys that the mask of a layer shows; both calls are shifted by ALiBi alike."""
    bias = None
    if mask.alibi != "none":
        slopes = alibi_slopes(mask.num_heads, balanced=mask.alibi == "balanced")
        bias, _ = decay_bias(alibi_decay(index, slopes))
    _, lse = dot_product_attention(
        query,
        key,
        key,
        bias,
        scale=mask.scale,
        is_causal=True,
        local_window_size=mask.local_window_size,
        num_sink_tokens=mask.num_sink_tokens,
        query_positions=positions,
        key_positions=positions,
        query_segment_ids=segment_ids,
        key_segment_ids=segment_ids,
        logits_soft_cap=mask.logits_soft_cap,
        return_residual=True,
    )
    return lse
