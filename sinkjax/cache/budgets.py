"""How many tokens a layer keeps per head, and how heads of a layer share them."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sinkjax.cache.policies.keep import best, rank_keys, slots_of


@runtime_checkable
class Budget(Protocol):
    """Tokens per key head of each layer: static, since it is the size of an array."""

    def layer(self, layer: int, num_layers: int) -> int:
        """The budget of layer 0 … L − 1."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The same number of tokens in every layer.

    Args:
        size: tokens per key head, at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Uniform.size: expected at least 1, got {self.size}")

    @classmethod
    def of(cls, length: int, ratio: float) -> "Uniform":
        """What stays of a prompt: $\\max(1, \\lfloor L (1 - r) \\rfloor)$.

        Args:
            length: L, tokens of the prompt.
            ratio: r, the part that is evicted, at least 0 and below 1.

        Raises:
            ValueError: a ratio outside of that.
        """
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio: expected at least 0 and below 1, got {ratio}")
        return cls(max(1, int(length * (1 - ratio))))

    def layer(self, layer: int, num_layers: int) -> int:
        """The size."""
        _check_layer(layer, num_layers)
        return self.size


@dataclasses.dataclass(frozen=True)
class Pyramid:
    r"""Much for the first layers, little for the last, linear between; `size` on average.

    From $2s - s/\beta$ in layer 0 down to $s/\beta$ in layer L − 1. When layer 0 would get more than
    the text behind the window, it gets all of that, and the last layer what is left of 2s. A pyramid
    whose top would not hold the window is given up for `size` everywhere.

    Why: lower layers spread their attention, upper ones gather it on few tokens.

    Args:
        size: s, tokens per key head on average; need not be whole: L·(1 − r) for a prompt.
        window: w, tokens that every layer must hold.
        beta: β, at least 1; the larger, the steeper.
        length: tokens of the prompt that is compressed; None: no end in sight.

    Source: Cai et al. 2024, arXiv 2406.02069; that the window is part of the budget, what
    happens at both ends and the rounding (to even from the middle) as in kvpress, pyramidkv_press.py.
    """

    size: float
    window: int = 64
    beta: float = 20
    length: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("window", 0), ("beta", 1)):
            if not getattr(self, name) >= least:
                got = getattr(self, name)
                raise ValueError(f"Pyramid.{name}: expected at least {least}, got {got}")
        if self.length is not None and self.length < self.size:
            raise ValueError(
                f"Pyramid.length: expected at least the size of {self.size}, got {self.length}"
            )

    def layer(self, layer: int, num_layers: int) -> int:
        """Rounded to a whole number of tokens."""
        _check_layer(layer, num_layers)
        least = self.size / self.beta
        most = 2 * self.size - least
        if self.length is not None and most >= self.length - self.window:
            most = self.length - self.window
            least = 2 * self.size - most
        if not most >= least >= self.window:
            return max(1, round(self.size))
        step = (most - least) / (num_layers - 1) if num_layers > 1 else 0.0
        return round(most - layer * step)


class Kept(NamedTuple):
    """Slots that stay, a different number per head.

    Args:
        slots: [B, K, capacity], ascending; −1 behind the last.
        counts: [B, K], how many.
    """

    slots: Int[Array, "B K capacity"]
    counts: Int[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Ada:
    r"""One budget for all key heads of a layer: the best tokens stay, whichever head they are of.

    Every head keeps at least $\max(1, \lfloor \alpha b \rfloor)$ of its own best (none for α = 0).

    Why: heads that look at one token waste a budget that others lack. Scores must be comparable
    between heads, as shares of attention are.

    Args:
        safeguard: α, from 0 to 1; 1 is the same for all heads.

    Source: Feng et al. 2024, arXiv 2407.11550, algorithm 1; the floor as in kvpress, adakv_press.py.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"Ada.safeguard: expected 0 to 1, got {self.safeguard}")

    def keep(
        self,
        scores: Float[Array, "B K S"],
        protect: Bool[Array, "B K S"],
        empty: Bool[Array, "B K S"],
        budget: int,
        capacity: int | None = None,
    ) -> Kept:
        """Share K·budget tokens among K heads.

        Ties, NaN and protected tokens are as in `policies.keep`, and between heads the later slot
        stays; a protected token goes before a head's safe share. Empty slots are never kept, so the
        counts are less than K·budget in all when that many tokens are not there.

        Args:
            scores, protect, empty: as in `policies.keep`.
            budget: tokens per head on average, at most S.
            capacity: most tokens of one head; None: what one head can get at most.

        Raises:
            ValueError: a budget outside 0 … S, or a capacity below it or above S.
        """
        B, K, S = scores.shape
        if not 0 <= budget <= S:
            raise ValueError(f"budget: expected 0 to S = {S}, got {budget}")
        size = min(S, K * budget) if capacity is None else capacity
        if not budget <= size <= S:
            raise ValueError(f"capacity: expected the budget of {budget} to {S}, got {capacity}")
        standing = rank_keys(scores, protect, empty)
        bound = jnp.iinfo(standing.dtype)
        safe = int(budget * self.safeguard)
        if self.safeguard > 0 and budget > 0:
            safe = max(1, safe)
        allowed = ~empty & best(standing, size)
        standing = jnp.where(~protect & best(standing, safe), bound.max - 1, standing)
        standing = jnp.where(allowed, standing, bound.min)
        # Slot by slot over all heads, so that among equals the later slot stays.
        rows = standing.swapaxes(1, 2).reshape(B, S * K)
        chosen = best(rows, K * budget).reshape(B, S, K).swapaxes(1, 2) & allowed
        return Kept(slots_of(chosen, empty, size), chosen.sum(-1).astype(jnp.int32))


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: expected 0 to {num_layers - 1}, got {layer}")
