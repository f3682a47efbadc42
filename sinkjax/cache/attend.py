"""Attention of a chunk on a layer's cache: equal to dense masked attention over the whole text."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sinkjax.cache import ring
from sinkjax.cache.compose import HeadGroups, attend_groups
from sinkjax.cache.layout import explicit_again, laid_out_as
from sinkjax.cache.store import Attended, Chunk, LayerView
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
) -> tuple[Float[Array, "B T N h"], Any]:
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
    _check(layer_state, query, key, window, num_sink_tokens, log_forget)
    run = functools.partial(
        _attend,
        rope=rope,
        normalizer=normalizer,
        position_bias=explicit_again(position_bias),
        differential=differential,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
    )
    params = None if normalizer_params is None else dict(normalizer_params)
    arrays = (query, key, value, positions, sinks, params, slots, log_forget)
    return laid_out_as((query, layer_state.state), run, layer_state, *arrays)


def _attend(
    view: LayerView,
    query,
    key,
    value,
    positions,
    sinks,
    normalizer_params,
    slots,
    log_forget,
    *,
    rope,
    normalizer,
    position_bias,
    differential,
    scale,
    logits_soft_cap,
) -> tuple[Array, Any]:
    """`attend`, checked, on automatic axes or none."""
    store = view.store
    if isinstance(store, HeadGroups):
        return attend_groups(
            attend,
            view,
            query,
            key,
            value,
            positions,
            rope=rope,
            sinks=sinks,
            normalizer=normalizer,
            normalizer_params=normalizer_params,
            slots=slots,
            position_bias=position_bias,
            log_forget=log_forget,
            differential=differential,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
        )
    refused = ring.refused(store.limit, positions)
    positions = ring.served(store.limit, positions)
    clock = jnp.maximum(positions, 0)
    from_start = clock if store.position_cap is None else jnp.minimum(clock, store.position_cap)
    # As stored, so that a token weighs the same from the chunk as from the cache; and finite where
    # nobody may look, since 0 · NaN is NaN.
    seen = (positions >= 0)[..., None, None]
    slot_query = jnp.where(seen, query, 0)
    if sinks is not None and sinks.ndim == 3:
        sinks = jnp.where(seen[..., 0], sinks, 0)
    sink_query = None
    if rope is not None:
        if store.position_cap is not None:
            sink_query = rotate(slot_query, from_start, rope)
        if slots is not None and slots.position == "start":
            slot_query = rotate(slot_query, from_start, rope)
        query, key = rotate(query, clock, rope), rotate(key, clock, rope)
    key = jnp.where(seen, key, 0).astype(view.dtype)
    value = jnp.where(seen, value, 0).astype(view.dtype)
    # Gates from the start of the chunk; what is stored counts backwards from its end.
    faded = None
    if log_forget is not None:
        wide = jnp.promote_types(view.dtype, jnp.float32)
        faded = jnp.where(seen[..., 0], log_forget, 0).astype(wide).cumsum(1)
    pool, finish = store.extend(view, Chunk(key, value, positions, faded, rope))

    logits = slot_logits(slot_query, slots, scale=scale, logits_soft_cap=logits_soft_cap)
    competing = logits if slots is not None and slots.competes else None
    described, joined = join_sinks(normalizer, sinks, competing)
    bias = None
    if faded is not None:
        bias = faded.swapaxes(1, 2)[..., None] + pool.decay[:, :, None, :]
    if position_bias is not None:
        at = pool.positions
        if at.ndim == 3:
            at = jnp.repeat(at, query.shape[2] // key.shape[2], axis=1)
        d = distances(positions, at)
        if store.position_cap is not None and pool.sink_slots > 0:
            first = at[..., : pool.sink_slots]
            first = first if pool.sink_positions is None else pool.sink_positions
            to_sinks = distances(from_start, first)
            d = jnp.concatenate([to_sinks, d[..., pool.sink_slots :]], axis=-1)
        at_distance = position_bias(d)
        bias = at_distance if bias is None else bias + at_distance

    options: dict[str, Any] = {
        "query_positions": positions,
        "key_positions": pool.positions,
        "sink_query": sink_query if pool.sink_slots > 0 else None,
        "num_sink_slots": pool.sink_slots,
        "num_sink_tokens": pool.num_sink_tokens,
        "window": pool.window,
        "bias": bias,
        "sinks": joined,
        "normalizer": described,
        "normalizer_params": normalizer_params,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
    }
    if pool.visible is not None:
        options["mask"] = pool.visible
    keys, values = pool.key, pool.value
    # Kernels write the token where it lies. Widened values are a copy, and so are mapped keys.
    maps_keys = differential or isinstance(resolve(described), Elu)
    if pool.slot is not None and pool.visible is None and not maps_keys:
        step = decode_step(query, key, value, keys, values, slots=pool.slot, **options)
        out, lse, keys, values = step.out, step.lse, step.key, step.value
    else:
        if pool.slot is not None:
            keys = ring.write(keys, pool.slot[:, None], key)
            values = ring.write(values, pool.slot[:, None], value)
        wide_values = widen_values(values, axis=1) if differential else values
        with_lse = slots is not None and slots.reads_lse
        if pool.attend is not None:
            out, lse = pool.attend(query, keys, wide_values, **options)
        else:
            results: Any = decode_attention(
                query, keys, wide_values, return_residual=with_lse, **options
            )
            out, lse = results if with_lse else (results, None)
    state = finish(Attended(query, sink_query, keys, values, scale, logits_soft_cap, rope))
    out = add_slot_values(out, slots, logits, lse, where=positions >= 0)
    return jnp.where(refused[..., None, None], jnp.nan, out), state


def _check(view: LayerView, query, key, window, num_sink_tokens, log_forget) -> None:
    """Refuse what the cache was not made for."""
    spec = view.spec
    B, _, K, H = key.shape
    if (B, K, H) != (view.batch_size, spec.num_kv_heads, spec.head_dim):
        raise ValueError(
            f"key: the cache was made for [B, K, H] = "
            f"{[view.batch_size, spec.num_kv_heads, spec.head_dim]}, got {[B, K, H]}"
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
