"""Gates between full and streaming attention, trained on passkeys with the model frozen."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from sinkjax.adapt.head_classes import streaming_config
from sinkjax.models import Decoder, DecoderConfig, from_parameters, parameters, unroll
from sinkjax.modules import Attention, AttentionConfig
from sinkjax.train.data import Rows
from sinkjax.train.log import Progress


@dataclasses.dataclass(frozen=True)
class HeadGateConfig:
    """How head gates are trained.

    Args:
        num_sink_tokens, window: P and W of a streaming head.
        steps: optimiser steps.
        batch_size: rows of a step.
        learning_rate: at the top.
        penalty: weight of the mean gate beside the distillation.
        ramp: share of the steps on which the rate goes up, and at the end down.
        floor: lowest share of the rate on a ramp.

    Raises:
        ValueError: names the field.

    Source: Xiao et al. 2024 (DuoAttention), arXiv 2410.10819, and the defaults of its code.
    """

    num_sink_tokens: int = 128
    window: int = 256
    steps: int = 2000
    batch_size: int = 1
    learning_rate: float = 0.02
    penalty: float = 0.05
    ramp: float = 0.2
    floor: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("num_sink_tokens", 0), ("window", 1), ("steps", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("ramp", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected from 0 to 1, got {getattr(self, name)}")

    def rate(self, step: Int[Array, "*steps"]) -> Float[Array, "*steps"]:
        """Learning rate of a step, counted from 0: up, flat, down."""
        ramp = max(self.ramp * self.steps, 1)
        up, down = (step + 1) / ramp, (self.steps - step) / ramp
        nearer = jnp.maximum(jnp.minimum(up, down), self.floor)
        return self.learning_rate * jnp.minimum(nearer, 1.0)


@dataclasses.dataclass(frozen=True)
class HeadGates:
    """What came out.

    Args:
        alphas: [L, K], 1 for a head that needs all of the text and 0 for one that does not; NaN in a
            layer whose own window is no longer than the streaming one. For `HeadPlan.from_scores`.
        history: per step `step`, `loss`, `distillation`, `mean_alpha` and `learning_rate`.
        config: how they were trained.
    """

    alphas: Float[np.ndarray, "L K"]
    history: list[dict[str, float]]
    config: HeadGateConfig


class HeadMixture(nnx.Module):
    r"""Attention of each head between all of its keys and the streaming ones.

    $$ o_n = \alpha_n \, o_n^\text{full} + (1 - \alpha_n) \, o_n^\text{streaming} $$

    Both are `Attention` with all of the layer's variants. What comes after a head's output is linear
    in it, so the gates are in the output kernels, α W and (1 − α) W: see `mixed_parameters`.

    Parameters: ``full/...`` and ``streaming/...``, each as of `Attention`.
    """

    def __init__(self, config: AttentionConfig, streaming: AttentionConfig, rngs: nnx.Rngs):
        self.full = Attention(config, rngs=rngs)
        self.streaming = Attention(streaming, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], **options: Any
    ) -> tuple[Float[Array, "B T D"], None, dict[str, Array]]:
        """As `Attention.__call__` without a cache and without statistics."""
        return self.full(x, **options)[0] + self.streaming(x, **options)[0], None, {}


def gated_layers(config: DecoderConfig, num_sink_tokens: int, window: int) -> tuple[int, ...]:
    """Layers of which there is something to learn: those that see further than the window."""
    return tuple(
        layer
        for layer in range(config.num_layers)
        if streaming_config(config.layer(layer), num_sink_tokens, window) is not None
    )


def mixed_decoder(
    config: DecoderConfig, params: Any, alphas: Float[Array, "M K"], gates: HeadGateConfig
) -> Decoder:
    """The decoder with a `HeadMixture` in each of its M gated layers.

    Args:
        config: without `scan_layers`.
        params: of the decoder, as `sinkjax.models.parameters` gives them.
        alphas: gates of the layers of `gated_layers`.
        gates: its P and W.
    """
    P, W = gates.num_sink_tokens, gates.window
    layers = gated_layers(config, P, W)

    def build() -> Decoder:
        model = Decoder(config, rngs=nnx.Rngs(0))
        for layer in layers:
            trained = config.layer(layer)
            streaming: Any = streaming_config(trained, P, W)
            mixture: Any = HeadMixture(trained, streaming, nnx.Rngs(0))
            model.blocks[layer].attention = mixture
        return model

    blocks = dict(params["blocks"])
    for layer, alpha in zip(layers, alphas, strict=True):
        attention = blocks[layer]["attention"]
        mixed = {"full": _scaled(attention, alpha), "streaming": _scaled(attention, 1 - alpha)}
        blocks[layer] = blocks[layer] | {"attention": mixed}
    graphdef, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, dict(params) | {"blocks": blocks})
    return nnx.merge(graphdef, state)


def _scaled(attention: Any, share: Float[Array, " K"]) -> Any:
    """The parameters of an attention layer with a share of each key/value head's output."""
    kernel = attention["out"]["kernel"]
    of_query_heads = jnp.repeat(share, kernel.shape[0] // share.shape[0])[:, None, None]
    return attention | {"out": {"kernel": kernel * of_query_heads}}


def train_head_gates(
    model: Decoder,
    rows: Rows,
    config: HeadGateConfig = HeadGateConfig(),  # noqa: B008 (frozen)
    *,
    progress: bool | None = None,
) -> HeadGates:
    r"""Learn for every key/value head how much of the text past its sinks and window it needs.

    $$ \ell = \frac{1}{\sum_t m_t} \sum_t m_t \, \frac{1}{D} \lVert h_t(\alpha) - h_t \rVert^2
       + \lambda \; \overline{\alpha}, \qquad \alpha \leftarrow \mathrm{clip}(\alpha, 0, 1) $$

    with h the last hidden states, of the model itself (all α = 1) and of the mixture, over the
    tokens with a target that counts. All gates start at 1; the penalty pulls down those that the
    passkeys do not need. Only the gates are trained. Step n takes rows n B … (n + 1) B − 1.

    Args:
        model: the decoder, scanned or not; it is not changed.
        rows: what `Passkeys` gives: `tokens`, `segment_ids` and `loss_mask`.
        config: how.
        progress: show a line on the terminal; None: where there is one.

    Returns:
        the gates, and what the loss did.

    Raises:
        ValueError: no layer sees further than the window; differential attention or an additive
            gate behind the output projection, whose heads do not add up.

    Source: Xiao et al. 2024 (DuoAttention), arXiv 2410.10819, and its code.
    """
    model = unroll(model)
    shape = model.config
    layers = gated_layers(shape, config.num_sink_tokens, config.window)
    if not layers:
        raise ValueError(
            f"window: expected one shorter than the windows of some layers, {shape.windows}, "
            f"got {config.window}"
        )
    if shape.differential or (shape.gate == "output" and shape.gate_activation == "additive"):
        raise ValueError(
            "model: expected heads whose outputs add up, got "
            f"differential={shape.differential}, gate={shape.gate!r}"
        )
    schedule: Any = config.rate
    optimizer = optax.adamw(schedule, weight_decay=0.0)
    params = parameters(model)
    alphas = jnp.ones((len(layers), shape.num_kv_heads), jnp.float32)
    state = optimizer.init(alphas)
    step = jax.jit(_step(shape, config, optimizer))
    rates = np.asarray(config.rate(jnp.arange(config.steps)))
    history = []
    with Progress(config.steps, 0, progress) as bar:
        for n in range(config.steps):
            batch = rows.rows(np.arange(n * config.batch_size, (n + 1) * config.batch_size))
            begin = time.perf_counter()
            alphas, state, record = step(alphas, state, params, batch)
            found = {name: float(value) for name, value in record.items()}
            history.append({"step": n + 1, **found, "learning_rate": float(rates[n])})
            seconds = time.perf_counter() - begin
            bar.update(n + 1, history[-1]["loss"], batch["tokens"].size / seconds)
    everywhere = np.full((shape.num_layers, shape.num_kv_heads), np.nan)
    everywhere[list(layers)] = np.asarray(alphas)
    return HeadGates(everywhere, history, config)


def _step(shape: DecoderConfig, config: HeadGateConfig, optimizer: Any) -> Any:
    """`step(alphas, state, params, batch) -> (alphas, state, record)`."""

    def hidden(model: Decoder, batch: dict[str, Array]) -> Array:
        found = model(batch["tokens"], segment_ids=batch["segment_ids"]).hidden
        return found.astype(jnp.promote_types(found.dtype, jnp.float32))

    def loss(alphas: Array, params: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        teacher = jax.lax.stop_gradient(hidden(from_parameters(shape, params), batch))
        student = hidden(mixed_decoder(shape, params, alphas, config), batch)
        counts = batch["loss_mask"].astype(student.dtype)
        error = jnp.mean((student - teacher) ** 2, axis=-1)
        distillation = jnp.sum(error * counts) / jnp.maximum(counts.sum(), 1)
        mean = jnp.abs(alphas).mean()
        value = distillation + config.penalty * mean
        return value, {"loss": value, "distillation": distillation, "mean_alpha": mean}

    def step(
        alphas: Array, state: Any, params: Any, batch: dict[str, Array]
    ) -> tuple[Array, Any, Any]:
        gradient, record = jax.grad(loss, has_aux=True)(alphas, params, batch)
        updates, state = optimizer.update(gradient, state, alphas)
        return jnp.clip(alphas + updates, 0, 1), state, record

    return step
