"""The specification of decode attention: dense over the cache, and never transposes it."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8

from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import int8

_EXACT = jax.lax.Precision.HIGHEST


class Step(NamedTuple):
    """What one token gives: the output and the log-sum-exp of attention, and the cache with the token."""

    # `Any`: tree transformations put all sorts of things in the place of arrays.
    out: Any
    lse: Any
    key: Any
    value: Any
    key_scale: Any = None
    value_scale: Any = None


def visible(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B #K S"],
    *,
    num_sink_tokens: int,
    window: int | None,
    num_sink_slots: int = 0,
    excludes_self: bool = False,
) -> Bool[Array, "B #K T S"]:
    """Who sees whom: 0 ≤ key ≤ query, and the key is a sink token or less than a window back.

    A sink token is known by its position or by its slot.
    """
    query, key = query_positions[:, None, :, None], key_positions[:, :, None, :]
    seen = (0 <= key) & ((key < query) if excludes_self else (key <= query))
    if window is not None:
        is_sink = (key < num_sink_tokens) | (jnp.arange(key.shape[-1]) < num_sink_slots)
        seen &= is_sink | (query - key < window)
    return seen


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B #K S"],
    sink_query: Float[Array, "B T N H"] | None = None,
    num_sink_slots: int = 0,
    num_sink_tokens: int = 0,
    window: int | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "B #K #T S"] | None = None,
    sinks: Float[Array, " N"] | Float[Array, "B T N"] | None = None,
    normalizer: normalizers.Normalizer,
    normalizer_params: Mapping[str, Array] | None = None,
    scale: float,
    logits_soft_cap: float | None = None,
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"] | None]:
    r"""$o_t = \sum_j w_{tj} v_j$, $x_{tj} = \langle q^{sink}_t, k_j \rangle$ for the first slots.

    $x_{tj} = \langle q_t, k_j \rangle$ for the others; then scale → soft cap → bias → mask → normaliser.
    One buffer with two queries is what lets a ring cache keep every key as it was written while
    the sink tokens stay at a bounded distance.

    Args:
        query: rotated at its own position.
        key, value: cache leaves; what an empty slot holds must be finite.
        query_positions: −1 (padding) sees nothing.
        key_positions: per slot; −1 is empty. Order is free.
        sink_query: the query for the sink slots; None is `query`.
        num_sink_slots: how many leading slots are sink slots, exempt from the window whatever the
            position of the key in them: sinks may lie anywhere in the text.
        num_sink_tokens: keys at positions below are exempt from the window wherever they lie.
        window: number of keys seen back, the query's own included; None is unbounded.
        bias: added to the logits after scale and soft cap; S counts slots, as they lie.
        mask: False where a query may not look although the positions allow it.
        sinks: sink logits per query head, or per token and head; neither scaled nor capped.
        normalizer_params: learned leaves, added to the constants of the normaliser; [N] each.
        key_scale, value_scale: with int8 leaves, what each slot is multiplied with; both or neither.

    Returns:
        the output in the query's dtype, exactly 0 where nothing is visible, and the log-sum-exp
        (float32 at least, sink included), None for a normaliser without one.

    Source: with the sink query rotated at `min(t, C − 1)` this is StreamingLLM (Xiao et al. 2023,
    §3.2) in closed form.
    """
    B, T, N, H = query.shape
    K = key.shape[1]
    G = N // K
    check_scales(key, value, key_scale, value_scale)
    dtype = jnp.promote_types(jnp.promote_types(query.dtype, key.dtype), jnp.float32)
    key, value = int8.dequantize(key, key_scale), int8.dequantize(value, value_scale)

    logits = _scores(query, key, dtype)
    if sink_query is not None and num_sink_slots > 0:
        # Written over: to score the two parts apart would copy the keys behind the cut.
        at_sinks = _scores(sink_query, key[:, :, :num_sink_slots], dtype)
        logits = jax.lax.dynamic_update_slice_in_dim(logits, at_sinks, 0, axis=-1)
    logits = logits * jnp.asarray(scale, dtype)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        heads = (1, 1) if bias.shape[1] == 1 else (K, G)
        logits = logits + bias.reshape(bias.shape[0], *heads, *bias.shape[2:]).astype(dtype)
    seen = visible(
        query_positions,
        key_positions,
        num_sink_tokens=num_sink_tokens,
        num_sink_slots=num_sink_slots,
        window=window,
        excludes_self=normalizer.excludes_self,
    )
    if mask is not None:
        seen &= mask
    if sinks is not None:
        per_token = jnp.broadcast_to(sinks, (B, T, N)).reshape(B, T, K, G)
        sinks = per_token.transpose(0, 2, 3, 1)
    params = {name: leaf.reshape(K, G, 1, 1) for name, leaf in (normalizer_params or {}).items()}
    weights, lse = normalizers.weights(
        normalizer,
        logits,
        seen[:, :, None],
        sinks=sinks,
        params=params,
        key_order=key_positions[:, :, None, None],
    )
    # One matrix product per key head; XLA on CPU is three times slower where it also has to
    # transpose the result.
    out = jnp.einsum(
        "BKRS,BKSh->BKRh",
        weights.reshape(B, K, G * T, -1),
        value.astype(weights.dtype),
        precision=_EXACT,
        preferred_element_type=dtype,
    )
    out = out.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4)
    out = out.reshape(B, T, N, value.shape[-1]).astype(query.dtype)
    return out, None if lse is None else lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def _scores(query, key, dtype) -> Array:
    """`[B, K, G, T, S]`: every query with the keys of its head."""
    B, T, N, H = query.shape
    K = key.shape[1]
    G = N // K
    product = functools.partial(jnp.einsum, precision=_EXACT, preferred_element_type=dtype)

    def at_once(query, key):
        return product("BTKGH,BKSH->BKGTS", query.reshape(B, T, K, G, H), key)

    def one_by_one(query, key):
        each = query.reshape(B, T, K, G, H).transpose(3, 1, 0, 2, 4).reshape(G * T, B, K, H)
        rows = [product("BKH,BKSH->BKS", q, key) for q in each]
        return jnp.stack(rows, axis=2).reshape(B, K, G, T, -1)

    if not 1 < G * T <= 4:
        return at_once(query, key)
    # XLA on CPU multiplies keys with so few queries faster one by one.
    return jax.lax.platform_dependent(query, key, cpu=one_by_one, default=at_once)


def decode_step(
    query: Float[Array, "B 1 N H"],
    new_key: Float[Array, "B 1 K H"],
    new_value: Float[Array, "B 1 K Hv"],
    key: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    value: Float[Array, "B K S Hv"] | Int8[Array, "B K S Hv"],
    *,
    slots: Int[Array, " B"],
    query_positions: Int[Array, "B 1"],
    key_positions: Int[Array, "B #K S"],
    key_scale: Float[Array, "B K S"] | None = None,
    value_scale: Float[Array, "B K S"] | None = None,
    **options: Any,
) -> Step:
    """Write one token per row into the cache, then attend to what the cache holds.

    Args:
        query: rotated at its own position.
        new_key, new_value: of the token; the key rotated as it is to be stored.
        key, value: cache leaves before the token.
        slots: where the token of each row goes; anything outside 0 … S − 1 (−1 say) writes nothing.
        key_positions: per slot, the position of the new token already among them.
        key_scale, value_scale: with int8 leaves: the token is quantised per head by `int8.quantize`,
            and attention sees what was written.
        options: of `decode_attention`.
    """
    B, _, K, H = new_key.shape
    if key.shape[:2] != (B, K) or key.shape[3] != H or value.shape[3] != new_value.shape[3]:
        raise ValueError(
            "new_key, new_value: expected the heads and sizes of the leaves "
            f"{list(key.shape)}, {list(value.shape)}, got {list(new_key.shape)}, "
            f"{list(new_value.shape)}"
        )
    check_scales(key, value, key_scale, value_scale)
    slots = jnp.where(slots < 0, key.shape[2], slots)  # a negative index would count from the end

    def write(leaf, new):
        # An index per head as well: a scatter of one index becomes updates that XLA on CPU makes of copies.
        at = leaf.at[jnp.arange(B)[:, None], jnp.arange(K), slots[:, None]]
        return at.set(new.astype(leaf.dtype), mode="drop", unique_indices=True)

    new_key, new_value = new_key[:, 0], new_value[:, 0]
    if key_scale is not None and value_scale is not None:
        new_key, new_key_scale = int8.quantize(new_key)
        new_value, new_value_scale = int8.quantize(new_value)
        key_scale = write(key_scale, new_key_scale)
        value_scale = write(value_scale, new_value_scale)
    key, value = write(key, new_key), write(value, new_value)
    out, lse = decode_attention(
        query,
        key,
        value,
        query_positions=query_positions,
        key_positions=key_positions,
        key_scale=key_scale,
        value_scale=value_scale,
        **options,
    )
    return Step(out, lse, key, value, key_scale, value_scale)


def check_scales(key, value, key_scale, value_scale) -> None:
    """Raises unless both leaves are int8 and have scales, or neither is and has.

    Raises:
        ValueError: names dtypes and what was given.
    """
    kinds = {x.dtype == jnp.int8 for x in (key, value)}
    given = {scale is not None for scale in (key_scale, value_scale)}
    if kinds != given or len(kinds) > 1:
        raise ValueError(
            "key_scale, value_scale: int8 keys and values need both, others take neither; got leaves of "
            f"{key.dtype} and {value.dtype} with "
            f"{[None if s is None else list(s.shape) for s in (key_scale, value_scale)]}"
        )
