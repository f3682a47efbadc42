"""Attention of a chunk on a layer's cache: equal to dense masked attention over the whole text."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.cache import ring
from sinkjax.cache.state import LayerState, LayerView
from sinkjax.ops.decode import decode_attention
from sinkjax.ops.rope import Rope, rotate
from sinkjax_kernels.normalizers import Normalizer


def attend(
    layer_state: LayerView,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    rope: Rope | None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: str | Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    window: int | None = None,
    num_sink_tokens: int = 0,
) -> tuple[Float[Array, "B T N H"], LayerState]:
    r"""Attend to (old cache ∪ chunk) under the true mask, then write.

    With R(p) the rotation at position p, the logits of query t are

    - $\langle R(\min(t, C-1)) q_t, R(j) k_j \rangle$ for sink token j (R(t) in `absolute`),
    - $\langle R(t) q_t, R(i) k_i \rangle$ for token i of the window, $t - W < i \le t$.

    So keys are stored rotated once and never touched, and the result does not depend on how
    the stream was cut into chunks: it is dense masked attention over the whole text.

    Args:
        layer_state: `cache.layer(l)`.
        query, key, value: of the chunk, *not* rotated.
        positions: ascending within a row and past everything the row has seen
            (`cache.next_positions(T)`); −1 is padding: it sees nothing, gives 0 and is not written.
        rope: the rotation; None leaves query and key as they are.
        sinks, normalizer, normalizer_params, scale, logits_soft_cap: as in `ops.decode_attention`.
        window, num_sink_tokens: the layer's trained mask; when given, it must be the one that the
            cache was made for.

    Returns:
        the output and the layer's new keys and values, for `Cache.advance`. A token that the cache
        cannot take (past int32 or past a `Full` length) gives NaN.

    Raises:
        ValueError: a mask or a shape that the cache was not made for.

    Source: Xiao et al. 2023, §3.2, in closed form.
    """
    plan, spec = layer_state.plan, layer_state.spec
    B, T, K, H = key.shape
    if (K, H) != (spec.num_kv_heads, spec.head_dim) or B != layer_state.key.shape[0]:
        raise ValueError(
            f"key: the cache was made for [B, K, H] = "
            f"{[layer_state.key.shape[0], spec.num_kv_heads, spec.head_dim]}, got {[B, K, H]}"
        )
    given = (window, num_sink_tokens)
    if window is not None and given != (spec.window, spec.num_sink_tokens):
        raise ValueError(
            f"window, num_sink_tokens: the cache was made for "
            f"{(spec.window, spec.num_sink_tokens)}, got {given}"
        )
    refused = ring.refused(plan, positions)
    positions = ring.served(plan, positions)
    clock = jnp.maximum(positions, 0)
    sink_query = None
    if rope is not None:
        if plan.position_cap is not None and plan.sink_slots > 0:
            sink_query = rotate(query, jnp.minimum(clock, plan.position_cap), rope)
        query, key = rotate(query, clock, rope), rotate(key, clock, rope)
    # As stored, so that a token weighs the same from the chunk as from the cache; and finite where
    # nobody may look, since 0 · NaN is NaN.
    seen = (positions >= 0)[..., None, None]
    key = jnp.where(seen, key, 0).astype(layer_state.key.dtype)
    value = jnp.where(seen, value, 0).astype(layer_state.value.dtype)
    slots = ring.slots(plan, positions)

    if T == 1:
        # The one slot it overwrites holds token t − W, which it no longer sees.
        state = LayerState(
            ring.write(layer_state.key, slots, key), ring.write(layer_state.value, slots, value)
        )
        key_positions = ring.write(layer_state.positions, slots, positions)
        keys, values = state.key, state.value
    else:
        # Sink tokens of the chunk go to their slots first, where `sink_query` meets them: whatever
        # comes later than the query is hidden by position. The ring must not be written before all
        # of the chunk has seen it.
        is_sink = (positions >= 0) & (positions < plan.sink_slots)
        held = LayerState(
            ring.write(layer_state.key, slots, key, where=is_sink),
            ring.write(layer_state.value, slots, value, where=is_sink),
        )
        held_positions = ring.write(layer_state.positions, slots, positions, where=is_sink)
        chunk_positions = jnp.where(is_sink, -1, positions)
        keys = jnp.concatenate([held.key, key.swapaxes(1, 2)], axis=2)
        values = jnp.concatenate([held.value, value.swapaxes(1, 2)], axis=2)
        key_positions = jnp.concatenate([held_positions, chunk_positions], axis=1)
        in_ring = (positions >= 0) & ~is_sink
        state = LayerState(
            ring.write(held.key, slots, key, where=in_ring),
            ring.write(held.value, slots, value, where=in_ring),
        )

    out: Any = decode_attention(
        query,
        keys,
        values,
        query_positions=positions,
        key_positions=key_positions,
        sink_query=sink_query,
        num_sink_slots=0 if sink_query is None else plan.sink_slots,
        num_sink_tokens=plan.num_sink_tokens,
        window=plan.window,
        sinks=sinks,
        normalizer=normalizer,
        normalizer_params=normalizer_params,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )
    return jnp.where(refused[..., None, None], jnp.nan, out), state
