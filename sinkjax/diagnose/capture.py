"""Capture: everything a decoder computes on some tokens, layer by layer, to look at."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sinkjax.models import Decoder, unroll
from sinkjax.models.parameters import from_parameters, parameters

# Field of `Capture` -> (module of the block or None for the block itself, name of the tap).
_TAPS: dict[str, tuple[str | None, str]] = {
    "weights": ("attention", "weights"),
    "query": ("attention", "query"),
    "key": ("attention", "key"),
    "query_rotated": ("attention", "query_rotated"),
    "key_rotated": ("attention", "key_rotated"),
    "value": ("attention", "value"),
    "gate": ("attention", "gate"),
    "attention_out": ("attention", "attention_out"),
    "residual_attention": (None, "residual_attention"),
    "residual_mlp": (None, "residual_mlp"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Capture:
    """What a decoder computed on [B, T] tokens; every field has a leading layer axis L.

    Args:
        embedding: [B, T, D] the residual stream before the first block (no layer axis).
        residual_attention: [L, B, T, D] residual stream after each attention half-block.
        residual_mlp: [L, B, T, D] residual stream after each MLP half-block.
        weights: [L, B, N, T, S] attention weights, as they multiply the values.
        query, key: [L, B, T, N, H], [L, B, T, K, H] before RoPE.
        query_rotated, key_rotated: the same after RoPE.
        value: [L, B, T, K, H].
        gate: [L, B, T, ...] what the gate multiplies by, of the shape of its scores (`Gate`); None
            without a gate.
        attention_out: [L, B, T, N, H] output of each head, after the gate.
        logits: [B, T, V]; hidden: [B, T, D] after the last norm.
        statistics: `Output.statistics` of the same call.
    """

    embedding: Any
    residual_attention: Any
    residual_mlp: Any
    weights: Any
    query: Any
    key: Any
    query_rotated: Any
    key_rotated: Any
    value: Any
    gate: Any
    attention_out: Any
    logits: Any
    hidden: Any
    statistics: dict[str, Any]

    @property
    def residual(self) -> Float[Array, "L 2 B T D"]:
        """The residual stream after each half-block: (after attention, after MLP)."""
        return jnp.stack([self.residual_attention, self.residual_mlp], axis=1)


def capture(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Capture:
    """Run a decoder once and keep its attention maps, states and residual stream.

    For pictures and interventions on a few short texts: attention maps take L B N T^2 numbers.
    Training and long texts use `model(tokens, statistics=True)`, which keeps nothing of size T^2.
    A scanned or rematerialised model is unrolled first (taps give nothing inside those).

    Args:
        model: the decoder.
        tokens: [B, T] ids.
        positions, segment_ids: as the model takes them.
    Returns:
        `Capture` of arrays on the device.
    """
    graphdef, state = nnx.split(capturable(model))
    return _jitted(graphdef, state, jnp.asarray(tokens), positions, segment_ids)


def capturable(model: Decoder) -> Decoder:
    """The same model, laid out so that its taps can be heard: one module per layer, no remat."""
    model = unroll(model)
    if model.config.remat == "none":
        return model
    config = dataclasses.replace(model.config, remat="none")
    return from_parameters(config, parameters(model))


def run(model: Decoder, tokens: Int[Array, "B T"], **options: Any) -> Capture:
    """`capture` without the jit, for use inside somebody else's; unused fields cost nothing there.

    Args:
        model: a model that `capturable` returned. tokens: [B, T] ids. options: of the model call.
    """

    def call(model: Decoder, tokens: Array):
        return model(tokens, statistics=True, **options)

    output, found = nnx.capture(call, nnx.Intermediate)(model, tokens)
    taps = nnx.to_pure_dict(found)
    blocks = [taps["blocks"][index] for index in range(model.config.num_layers)]
    return Capture(
        embedding=model.embed(tokens),
        logits=output.logits,
        hidden=output.hidden,
        statistics=output.statistics,
        **{field: _stacked(blocks, *place) for field, place in _TAPS.items()},
    )


@partial(jax.jit, static_argnums=0)
def _jitted(graphdef, state, tokens, positions, segment_ids) -> Capture:
    model = nnx.merge(graphdef, state)
    return run(model, tokens, positions=positions, segment_ids=segment_ids)


def _stacked(blocks: list[Mapping[str, Any]], module: str | None, name: str) -> Any:
    owners = blocks if module is None else [block[module] for block in blocks]
    if name not in owners[0]:
        return None
    values = [owner[name] for owner in owners]
    # A tap that is sown once arrives as a tuple of one.
    return jnp.stack([value[0] if isinstance(value, tuple) else value for value in values])
