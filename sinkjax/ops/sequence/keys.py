"""What travels with the keys of a call: their values, and a bias that all queries share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def keys_of(arrays: dict[str, Any]) -> dict[str, Array]:
    """The operands that belong to keys, each `[B, S, ...]`."""
    found = {name: arrays[name] for name in ("key", "value")}
    if arrays["bias"] is not None:  # [b, n, 1, S]
        bias = arrays["bias"][:, :, 0].swapaxes(1, 2)
        found["bias"] = jnp.broadcast_to(bias, (found["key"].shape[0], *bias.shape[1:]))
    return found


def operands_of(keys: dict[str, Array]) -> dict[str, Any]:
    """Such operands as attention takes them."""
    bias = keys.get("bias")
    return {
        "key": keys["key"],
        "value": keys["value"],
        "bias": None if bias is None else bias.swapaxes(1, 2)[:, :, None],
        "mask": None,
    }
