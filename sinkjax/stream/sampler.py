"""From logits to a token."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sinkjax.ops.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class Sampler:
    r"""Draws $j \sim p$, $p \propto e^{x / \tau}$ cut to the k likeliest and then to the nucleus.

    The nucleus is the smallest set of likeliest tokens whose mass reaches `top_p`, measured
    after temperature and `top_k`; the likeliest token is always in it.

    Args:
        temperature: τ, at least 0; 0 is greedy (the first of equal maxima).
        top_k: number of tokens kept, or None for all.
        top_p: mass kept, in (0, 1], or None for all.

    Source: nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"Sampler.temperature: expected a finite number of at least 0, "
                f"got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampler.top_k: expected at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampler.top_p: expected a mass in (0, 1], got {self.top_p}")

    def __call__(
        self, key: Key[Array, ""], logits: Float[Array, "*rows V"], forbidden: Sequence[int] = ()
    ) -> Int[Array, "*rows"]:
        """One token per row.

        Args:
            key: a PRNG key; the same key and logits give the same token.
            logits: of the next token.
            forbidden: ids that are never drawn.
        """
        logits = at_least_float32(logits)
        if forbidden:
            logits = logits.at[..., jnp.asarray(forbidden)].set(-jnp.inf)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, logits).astype(jnp.int32)
        V = logits.shape[-1]
        # The k likeliest in order: ties are cut by rank, and the nucleus is a prefix.
        logits, tokens = jax.lax.top_k(logits, V if self.top_k is None else min(self.top_k, V))
        if self.top_p is not None:
            p = jax.nn.softmax(logits, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p
            first = jnp.arange(p.shape[-1]) == 0
            logits = jnp.where((before < self.top_p) | first, logits, -jnp.inf)
        drawn = jax.random.categorical(key, logits)
        return jnp.take_along_axis(tokens, drawn[..., None], axis=-1)[..., 0].astype(jnp.int32)
