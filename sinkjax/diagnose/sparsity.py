"""What sparse attention would lose: the share of a model's attention that each pattern keeps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sinkjax.diagnose.capture import capturable, capture
from sinkjax.models import Decoder
from sinkjax.ops.sparse import Pattern, recall, select


class Kept(NamedTuple):
    """What a pattern keeps of each head's attention.

    recall: [L, N], share of the dense attention mass, a mean over rows and queries; 1 loses nothing.
    read: [L, N], blocks of keys that are read as a share of those that causality lets be read.
    truncated: [L, N], blocks that the pattern wanted and its budget had no room for, a mean over rows.
    """

    recall: Float[np.ndarray, "L N"]
    read: Float[np.ndarray, "L N"]
    truncated: Float[np.ndarray, "L N"]


def sparse_recall(
    model: Decoder, tokens: Int[Array | np.ndarray, "B T"], patterns: Mapping[str, Pattern]
) -> dict[str, Kept]:
    """How much of its attention a model would keep on these tokens, by pattern, layer and head.

    The prompt is one chunk, at the model's own positions. What a layer masks or biases by itself
    (a window, ALiBi) is left out: patterns are for layers that look at everything.

    Args:
        model: a decoder.
        tokens: [B, T] ids.
        patterns: by the name under which the result is wanted.

    Source: the criterion of Jiang et al. 2024, arXiv 2407.02490, §3.2.
    """
    model = capturable(model)
    found = capture(model, tokens)
    results = {}
    for name, pattern in patterns.items():
        kept = []
        for layer, (query, key) in enumerate(
            zip(found.query_rotated, found.key_rotated, strict=True)
        ):
            config = model.config.layer(layer)
            at = jnp.broadcast_to(jnp.arange(query.shape[1], dtype=jnp.int32), query.shape[:2])
            options: dict[str, Any] = dict(query_positions=at, key_positions=at)
            options |= dict(scale=config.scale, logits_soft_cap=config.logits_soft_cap)
            keys = key.swapaxes(1, 2)
            chosen = select(pattern, query, keys, **options)
            Q = chosen.counts.shape[2]
            share = chosen.counts.sum(-1) / (Q * (Q + 1) / 2)
            kept.append((recall(query, keys, chosen, **options), share, chosen.truncated))
        results[name] = Kept(
            *(np.stack([np.asarray(x).mean(0) for x in part]) for part in zip(*kept, strict=True))
        )
    return results
