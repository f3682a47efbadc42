"""What every model returns."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Output:
    """Result of a model call, a pytree.

    Args:
        logits: [B, T, V], float32 at least. Under jit they cost nothing when unused.
        hidden: [B, T, D], what the head reads: after the last norm and, where there is one, the
            projection behind it; `model.head(hidden)` gives the logits.
        cache: the cache after this call, None without one.
        aux: named scalar losses: penalties that were asked for, unweighted.
        statistics: reductions by name, each with a leading layer axis [L, ...]; empty unless asked.
    """

    logits: Any
    hidden: Any
    cache: Any = None
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Output, ["logits", "hidden", "cache", "aux", "statistics"], [])
