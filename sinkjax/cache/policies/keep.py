"""From scores, protected tokens and a budget to the slots that stay."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def keep(
    scores: Float[Array, "B K S"],
    protect: Bool[Array, "B K S"],
    empty: Bool[Array, "B K S"],
    budget: int,
) -> Int[Array, "B K budget"]:
    """The slots that stay: the protected ones, then those of the highest scores.

    A protected token beats every score, infinite ones too; a NaN counts as −∞; between equals the
    later slot stays; an empty slot is taken only when nothing else is left.

    Why three arguments: a score that stands for "must stay" ties with other scores, and then sinks
    are lost (kvpress issue #227).

    Args:
        scores: higher is kept.
        protect: kept whatever the score. The caller's budget has to hold them all: of more than
            that the later stay, and sinks are early.
        empty: slots that hold no token, protected or not.
        budget: slots to keep per head, at most S.

    Returns:
        their indices in ascending order, those of empty slots last.

    Raises:
        ValueError: a budget below 0 or above S.
    """
    S = scores.shape[-1]
    if not 0 <= budget <= S:
        raise ValueError(f"budget: expected 0 to S = {S}, got {budget}")
    chosen = best(rank_keys(scores, protect, empty), budget)
    return slots_of(chosen, empty, budget)


def weakest(
    scores: Float[Array, "B K S"],
    protect: Bool[Array, "B K S"],
    empty: Bool[Array, "B K S"],
    positions: Int[Array, "B K S"],
) -> Int[Array, "B K"]:
    """The slot to overwrite with the next token: an empty one, or that of the lowest score.

    Why: one token in place of one token moves nothing else, so slots need not be in the order of the
    text; between equals the token of the earlier position goes, as in `keep`.

    Args:
        scores, protect, empty: as in `keep`; a protected token goes only when all are protected.
        positions: of what is held.
    """
    standing = rank_keys(scores, protect, empty)
    lowest = standing == standing.min(-1, keepdims=True)
    late = jnp.iinfo(positions.dtype).max
    return jnp.argmin(jnp.where(lowest, positions, late), axis=-1).astype(jnp.int32)


def rank_keys(
    scores: Float[Array, "*rows S"], protect: Bool[Array, "*rows S"], empty: Bool[Array, "*rows S"]
) -> Int[Array, "*rows S"]:
    """Integers in the order of standing: empty < NaN = −∞ < scores ascending = ∞ < protected.

    The bits of a float, as an integer of the same size, ascend with the float once those of negative
    floats are inverted. That leaves integers above ∞ for what must stay, and below −∞ for what is
    not there, which no float has.
    """
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    wide = jnp.where(jnp.isnan(wide), -jnp.inf, jnp.where(wide == 0, 0, wide))  # −0 is 0
    integer = jnp.dtype(f"int{wide.dtype.itemsize * 8}")
    bits = jax.lax.bitcast_convert_type(wide, integer)
    bits = jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)
    bits = jnp.where(protect, jnp.iinfo(integer).max, bits)
    return jnp.where(empty, jnp.iinfo(integer).min, bits)


def best(standing: Int[Array, "*rows S"], count: int) -> Bool[Array, "*rows S"]:
    """The `count` highest of each row; of equals the later.

    Sorts of integers alone: on CPU several times faster than a sort that carries indices along, as
    `jax.lax.top_k` does.
    """
    S = standing.shape[-1]
    if count in (0, S):
        return jnp.full(standing.shape, count == S)
    slots = jnp.arange(S, dtype=jnp.int32)
    if count == S - 1:
        return slots != jnp.argmin(standing, axis=-1, keepdims=True)
    cut = jnp.sort(standing, axis=-1)[..., S - count, None]
    order = jnp.where(standing > cut, slots + S, jnp.where(standing == cut, slots, -1))
    return order >= jnp.sort(order, axis=-1)[..., S - count, None]


def slots_of(
    chosen: Bool[Array, "B K S"], empty: Bool[Array, "B K S"], size: int
) -> Int[Array, "B K size"]:
    """Indices of the chosen slots, ascending, empty ones after all others; −1 when they run out."""
    S = chosen.shape[-1]
    slots = jnp.arange(S, dtype=jnp.int32)
    order = jnp.where(chosen, jnp.where(empty, slots + S, slots), 2 * S)
    first = jnp.sort(order, axis=-1)[..., :size]
    return jnp.where(first < 2 * S, first % S, -1)
