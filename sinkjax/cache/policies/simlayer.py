"""Which layers look at nothing but the sinks and the last tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sinkjax.cache.policies.evidence import Evidence, last_weights


def local_mass(
    evidence: Evidence,
    num_sink_tokens: int = 4,
    window: int = 1024,
    *,
    own: bool = True,
) -> Float[Array, " B"]:
    """Share of the last queries' attention that falls on sink tokens and window, mean over heads.

    Args:
        evidence: of one layer, with its last queries (the paper takes those of the last tokens of the
            prompt, kvpress the last one).
        num_sink_tokens: tokens at the start of the text.
        window: last tokens of the text.
        own: False leaves out the tokens from the oldest of the queries on and counts the window
            before them, as kvpress does.

    Source: Zhang et al. 2024, arXiv 2410.13846; kvpress, simlayerkv_press.py.
    """
    weights = last_weights(evidence, "local_mass").sum((2, 3))
    at, positions = evidence.query_positions, evidence.positions
    end = evidence.time
    if not own:
        end = jnp.where(at >= 0, at, jnp.iinfo(jnp.int32).max).min(-1)
    end = end[:, None, None]
    local = (positions < num_sink_tokens) | (end - positions <= window)
    total = jnp.where(local & (positions < end), weights, 0).sum((1, 2))
    return total / (jnp.maximum((at >= 0).sum(-1), 1) * evidence.queries.shape[2])


def lazy_layers(mass: Float[Array, "L *rows"], threshold: float) -> Bool[Array, " L"]:
    """True for a layer whose mean local mass is above the threshold: sinks and a window do for it.

    Why: such a layer loses little by keeping no more; `cache.PerLayer` takes the answer.

    Args:
        mass: `local_mass` of every layer, for one text or several.
        threshold: SimLayerKV gives 0.9 for Llama 3, 0.65 for Llama 2, 0.8 for Mistral, 0.85 for Qwen.

    Source: as `local_mass`.
    """
    return mass.reshape(mass.shape[0], -1).mean(1) > threshold
