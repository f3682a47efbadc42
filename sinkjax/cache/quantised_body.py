"""Groups of quantised tokens, and how tokens become one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sinkjax.ops.quantize import Quantized, dequantize, quantize


class Tokens(NamedTuple):
    """Tokens in full precision: slots C along axis 2 of every leaf, or groups and tokens [n, g].

    Args:
        key, value: [B, K, C, H].
        positions: [B, 1, C]; −1 where a slot is empty or its group has moved to the body.
        decay: [B, N, C] as of a `Ring`, or None.
    """

    key: Any
    value: Any
    positions: Any
    decay: Any = None


class Body(NamedTuple):
    """n groups of g quantised tokens; one that never came has position −1 and bytes of 0.

    Args:
        key: codes [B, K, n, g, bytes], scale and zero [B, K, n, 1, H].
        value: codes [B, K, n, g, c, bytes], scale and zero [B, K, n, g, c, 1]; c groups of channels.
        positions: [B, 1, n, g].
        decay: [B, N, n, g] or None; not quantised.
    """

    key: Quantized
    value: Quantized
    positions: Any
    decay: Any = None


@dataclasses.dataclass(frozen=True)
class Coding:
    """Keys per channel over the tokens of a group, values per token over its channels.

    Args: those of the same name of `Quantised`.
    """

    bits: int
    value_group_size: int | None
    symmetric: bool
    scale_dtype: str | None

    def encode(self, groups: Tokens) -> Body:
        """Tokens [n, g] as a body."""
        options: Any = {"bits": self.bits, "symmetric": self.symmetric}
        options["dtype"] = groups.key.dtype if self.scale_dtype is None else self.scale_dtype
        size = self.value_group_size or groups.value.shape[-1]
        value = groups.value.reshape(*groups.value.shape[:-1], -1, size)
        there = groups.positions[..., None] >= 0
        return Body(
            quantize(groups.key, axis=-2, where=there, **options),
            quantize(value, axis=-1, where=there[..., None], **options),
            groups.positions,
            groups.decay,
        )

    def decode(self, body: Body, head_dim: int, dtype: DTypeLike) -> Tokens:
        """The tokens of all groups as slots."""
        size = self.value_group_size or head_dim
        key = dequantize(body.key, bits=self.bits, size=head_dim, dtype=dtype)
        value = dequantize(body.value, bits=self.bits, size=size, dtype=dtype)
        return flat(Tokens(key, value.reshape(key.shape), body.positions, body.decay))


def grouped(tokens: Tokens, group_size: int) -> Tokens:
    """Slots as [n, g]."""
    return jax.tree.map(
        lambda leaf: leaf.reshape(*leaf.shape[:2], -1, group_size, *leaf.shape[3:]), tokens
    )


def flat(groups: Tokens) -> Tokens:
    """[n, g] as slots."""
    return jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:2], -1, *leaf.shape[4:]), groups)


def take(tree: Any, begin: int, end: int | None) -> Any:
    """Some of the slots or groups."""
    return jax.tree.map(lambda leaf: leaf[:, :, begin:end], tree)


def join(*trees: Any) -> Any:
    """Slots or groups beside one another."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *trees)
