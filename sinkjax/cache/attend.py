"""Attention of a chunk on a layer's cache: equal to dense masked attention over the whole text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.cache import ring
from sinkjax.cache.state import LayerState, LayerView
from sinkjax.ops.decode import decode_attention, decode_step
from sinkjax.ops.differential import widen_values
from sinkjax.ops.positions import distances
from sinkjax.ops.rope import Rope, rotate
from sinkjax.ops.slots import Slots, add_slot_values, join_sinks, slot_logits
from sinkjax_kernels.normalizers import Elu, Normalizer, resolve


def attend(
    layer_state: LayerView,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    rope: Rope | None,
    sinks: Float[Array, " N"] | Float[Array, "N m"] | Float[Array, "B T N"] | None = None,
    normalizer: str | Normalizer = "softmax",
    normalizer_params: Mapping[str, Array] | None = None,
    slots: Slots | None = None,
    position_bias: Callable[[Array], Array] | None = None,
    log_forget: Float[Array, "B T N"] | None = None,
    differential: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    window: int | None = None,
    num_sink_tokens: int = 0,
) -> tuple[Float[Array, "B T N h"], LayerState]:
    r"""Attend to (old cache ∪ chunk) under the true mask, then write.

    With R(p) the rotation at position p, the logits of query t are

    - $\langle R(\min(t, C-1)) q_t, R(j) k_j \rangle$ for sink token j (R(t) in `absolute`),
    - $\langle R(t) q_t, R(i) k_i \rangle$ for token i of the window, $t - W < i \le t$.

    So keys are stored rotated once and never touched, and the result does not depend on how
    the stream was cut into chunks: it is dense masked attention over the whole text.

    Whatever else depends on a distance is held to the same: the start of the text and a sink token
    j are $\min(t, C-1)$ and $\min(t, C-1) - j$ away. What fades with a forget gate fades as the
    gates say.

    Args:
        layer_state: `cache.layer(l)`.
        query, key, value: of the chunk, *not* rotated.
        positions: ascending within a row and past everything the row has seen
            (`cache.next_positions(T)`); −1 is padding: it sees nothing, gives 0 and is not written.
        rope: the rotation; None leaves query and key as they are.
        sinks: sink logits per head, several per head, or per token and head; only with softmax.
        normalizer, normalizer_params, scale, logits_soft_cap: as in `ops.decode_attention`.
        slots: learned keys and values, beside whatever the cache holds; not in the cache.
        position_bias: from distances `[B, 1, T, S]` to what is added to the logits,
            `[#B, N, T, S]`; `ops.alibi_bias` for example.
        log_forget: logarithms of the forget gates of the chunk; the cache must be made with
            `LayerSpec.num_forget_heads`.
        differential: values of both heads of a pair side by side, h = 2H, for `ops.combine`.
        window, num_sink_tokens: the layer's trained mask; when given, it must be the one that the
            cache was made for.

    Returns:
        the output (h is H, or 2H with `differential`) and the layer's new state, for
        `Cache.advance`. A token that the cache cannot take (past int32 or past a `Full` length)
        gives NaN.

    Raises:
        ValueError: a mask, a shape or a gate that the cache was not made for.

    Source: Xiao et al. 2023, §3.2, in closed form.
    """
    plan = layer_state.plan
    _check(layer_state, query, key, window, num_sink_tokens, log_forget)
    T = query.shape[1]
    refused = ring.refused(plan, positions)
    positions = ring.served(plan, positions)
    clock = jnp.maximum(positions, 0)
    from_start = clock if plan.position_cap is None else jnp.minimum(clock, plan.position_cap)
    # As stored, so that a token weighs the same from the chunk as from the cache; and finite where
    # nobody may look, since 0 · NaN is NaN.
    seen = (positions >= 0)[..., None, None]
    slot_query = jnp.where(seen, query, 0)
    if sinks is not None and sinks.ndim == 3:
        sinks = jnp.where(seen[..., 0], sinks, 0)
    capped = plan.position_cap is not None and plan.sink_slots > 0
    sink_query = None
    if rope is not None:
        if capped:
            sink_query = rotate(slot_query, from_start, rope)
        if slots is not None and slots.position == "start":
            slot_query = rotate(slot_query, from_start, rope)
        query, key = rotate(query, clock, rope), rotate(key, clock, rope)
    key = jnp.where(seen, key, 0).astype(layer_state.key.dtype)
    value = jnp.where(seen, value, 0).astype(layer_state.value.dtype)
    index = ring.slots(plan, positions)
    # Gates from the start of the chunk; what is stored counts backwards from its end.
    faded = None
    if log_forget is not None:
        faded = jnp.where(seen[..., 0], log_forget, 0).astype(layer_state.decay.dtype).cumsum(1)

    def write(old, key, value, faded, *, where=None) -> LayerState:
        return LayerState(
            old.key if key is None else ring.write(old.key, index, key, where=where),
            old.value if value is None else ring.write(old.value, index, value, where=where),
            None if faded is None else ring.write(old.decay, index, -faded, where=where),
        )

    logits = slot_logits(slot_query, slots, scale=scale, logits_soft_cap=logits_soft_cap)
    competing = logits if slots is not None and slots.competes else None
    described, joined = join_sinks(normalizer, sinks, competing)
    # Kernels write the token where it lies. Widened values are a copy, and so are mapped keys.
    in_place = T == 1 and not differential and not isinstance(resolve(described), Elu)
    if T == 1:
        # The one slot it overwrites holds token t − W, which it no longer sees.
        new = (None, None) if in_place else (key, value)
        state = write(layer_state, *new, faded)
        key_positions = ring.write(layer_state.positions, index, positions)
        keys, values, decay = state.key, state.value, state.decay
    else:
        # Sink tokens of the chunk go to their slots first, where `sink_query` meets them: whatever
        # comes later than the query is hidden by position. The ring must not be written before all
        # of the chunk has seen it.
        is_sink = (positions >= 0) & (positions < plan.sink_slots)
        held = write(layer_state, key, value, faded, where=is_sink)
        held_positions = ring.write(layer_state.positions, index, positions, where=is_sink)
        chunk_positions = jnp.where(is_sink, -1, positions)
        keys = jnp.concatenate([held.key, key.swapaxes(1, 2)], axis=2)
        values = jnp.concatenate([held.value, value.swapaxes(1, 2)], axis=2)
        key_positions = jnp.concatenate([held_positions, chunk_positions], axis=1)
        decay = None
        if faded is not None:
            decay = jnp.concatenate([held.decay, -faded.swapaxes(1, 2)], axis=2)
        state = write(held, key, value, faded, where=(positions >= 0) & ~is_sink)
    bias = None
    if faded is not None and decay is not None:
        bias = faded.swapaxes(1, 2)[..., None] + decay[:, :, None, :]
        state = dataclasses.replace(state, decay=state.decay + faded[:, -1, :, None])
    if position_bias is not None:
        d = distances(positions, key_positions)
        if capped:
            P = plan.sink_slots
            to_sinks = distances(from_start, key_positions[:, :P])
            d = jnp.concatenate([to_sinks, d[..., P:]], axis=-1)
        at_distance = position_bias(d)
        bias = at_distance if bias is None else bias + at_distance
    if differential:
        values = widen_values(values, axis=1)

    options: dict[str, Any] = {
        "query_positions": positions,
        "key_positions": key_positions,
        "sink_query": sink_query,
        "num_sink_slots": 0 if sink_query is None else plan.sink_slots,
        "num_sink_tokens": plan.num_sink_tokens,
        "window": plan.window,
        "bias": bias,
        "sinks": joined,
        "normalizer": described,
        "normalizer_params": normalizer_params,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
    }
    if in_place:
        step = decode_step(query, key, value, keys, values, slots=index[:, 0], **options)
        out, lse = step.out, step.lse
        state = dataclasses.replace(state, key=step.key, value=step.value)
    else:
        with_lse = slots is not None and slots.reads_lse
        results: Any = decode_attention(query, keys, values, return_residual=with_lse, **options)
        out, lse = results if with_lse else (results, None)
    out = add_slot_values(out, slots, logits, lse, where=positions >= 0)
    return jnp.where(refused[..., None, None], jnp.nan, out), state


def _check(view: LayerView, query, key, window, num_sink_tokens, log_forget) -> None:
    """Refuse what the cache was not made for."""
    spec = view.spec
    B, _, K, H = key.shape
    if (K, H) != (spec.num_kv_heads, spec.head_dim) or B != view.key.shape[0]:
        raise ValueError(
            f"key: the cache was made for [B, K, H] = "
            f"{[view.key.shape[0], spec.num_kv_heads, spec.head_dim]}, got {[B, K, H]}"
        )
    given = (window, num_sink_tokens)
    if window is not None and given != (spec.window, spec.num_sink_tokens):
        raise ValueError(
            f"window, num_sink_tokens: the cache was made for "
            f"{(spec.window, spec.num_sink_tokens)}, got {given}"
        )
    heads = 0 if log_forget is None else query.shape[2]
    if heads != spec.num_forget_heads:
        raise ValueError(
            f"log_forget: the cache was made for {spec.num_forget_heads} heads with a forget gate, "
            f"got {heads}"
        )
