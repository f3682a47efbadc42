"""The training step and the evaluation step: pure functions of arrays, jitted once."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from sinkjax.models.config import DecoderConfig
from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import from_parameters, parameters
from sinkjax.ops import statistics as formulas
from sinkjax.ops.head_loss import head_cross_entropy
from sinkjax.ops.losses import cross_entropy
from sinkjax.ops.outliers import psi
from sinkjax.ops.penalties import counted, segments
from sinkjax.ops.precision import at_least_float32
from sinkjax.sharding import (
    DECODER_RULES,
    ROWS,
    batch_sharding,
    constrain,
    laid_out_by_compiler,
    shardings,
)
from sinkjax.train.config import RunConfig
from sinkjax.train.optim import make_optimizer, schedule
from sinkjax.train.overlap import compiler_options

# 1 GiB of float32: a sixteenth of the smallest TPU, and thousands of tokens to a chunk at a vocabulary
# of 128,256, so that reading the head and adding to its gradient hide behind the products.
LARGEST_LOGITS = 1 << 28


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes, as one pytree of arrays (or of their shapes, or shardings).

    Args:
      params: nested dictionaries, `sinkjax.models.parameters`.
      opt_state: of the optax chain.
      step: int32 scalar, steps done.
      key: typed random key of the run; a step that needs one takes `fold_in(key, step)`.
    """

    params: Any
    opt_state: Any
    step: Any
    key: Any


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of a run; no memory at any size."""
    shapes = jax.eval_shape(lambda: _initial(config))
    placed = shardings(shapes, mesh, DECODER_RULES)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placed,
    )


def init_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """State at step 0, every parameter made on the devices that keep it.

    The numbers depend on `config.seed`, not on the mesh.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(lambda: _initial(config), out_shardings=placed)()


def _initial(config: RunConfig) -> TrainState:
    key = jax.random.key(config.seed)
    params = parameters(Decoder(config.model, rngs=nnx.Rngs(config.seed)))
    opt_state = make_optimizer(config.optimizer, config.steps).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key)


def loss_chunks(config: RunConfig, mesh: Mesh | AbstractMesh, rows: int) -> int:
    """In how many parts a device goes through the logits of its tokens, see `OptimizerConfig`.

    Args:
      config: of the run.
      mesh: over which rows, their tokens and the vocabulary are cut.
      rows: of the batch, or of a microbatch.
    """
    if config.optimizer.loss_chunks is not None:
        return config.optimizer.loss_chunks
    cuts = math.prod(mesh.shape.get(name, 1) for name in (*ROWS, "sequence"))
    tokens = math.ceil(rows * config.model.context_length / cuts)
    columns = math.ceil(config.model.vocab_size / mesh.shape.get("model", 1))
    return math.ceil(tokens * columns / LARGEST_LOGITS)


def make_train_step(config: RunConfig, mesh: Mesh) -> Callable[[TrainState, Any], Any]:
    r"""Jitted `step(state, batch) -> (state, metrics)`; the state it is given is donated.

    $$ \ell = \frac{1}{\sum_t m_t} \sum_t m_t (\mathrm{nll}_t + z \cdot \mathrm{lse}_t^2)
       + \sum_i w_i \, \text{penalty}_i + \text{aux} $$

    With `accumulation_steps` A the batch is cut into A microbatches whose gradients are added one
    at a time; the sum is over the tokens of the whole batch, so A changes memory, not the loss.
    `load_balancing` is the exception: a product of two means, it evens out each microbatch.

    Args:
      config: of the run.
      mesh: where the state lives.

    Returns:
      A function of a state and a batch (`sinkjax.train.data`). Metrics are scalars: `loss` (what
      is minimised), `nll` in nats per token, each penalty that has a weight (without it),
      `gradient_norm` before clipping, `learning_rate`.
    """
    weights = config.penalties.weights
    parts = config.optimizer.accumulation_steps
    optimizer = make_optimizer(config.optimizer, config.steps)
    rate = schedule(config.optimizer, config.steps)
    chunks = loss_chunks(config, mesh, config.data.batch_size // parts)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))

    def loss(params: Any, batch: Any, totals: Any) -> tuple[Array, dict[str, Array]]:
        output = _apply(config.model, params, batch, penalties=tuple(weights))
        mean, parts_of_loss = _cross_entropy(
            config.model, params, output, batch, config.optimizer.z_loss, chunks
        )
        share = parts_of_loss["tokens"] / totals["loss_mask"]
        found = {"nll": parts_of_loss["nll"] * share}
        value = mean * share
        for name, extra in output.aux.items():
            if name in weights:  # a mean over tokens of its own
                found[name] = extra * _tokens(name, batch) / totals[name]
                value += weights[name] * found[name]
            else:
                value += extra / parts
        return value, found

    def gradients(params: Any, batch: Any) -> tuple[tuple[Array, Any], Any]:
        counts = {name: _tokens(name, batch) for name in ("loss_mask", *weights)}
        totals = {name: jnp.maximum(count, 1) for name, count in counts.items()}

        def value_and_grad(part: Any) -> tuple[tuple[Array, Any], Any]:
            found, grads = jax.value_and_grad(loss, has_aux=True)(params, part, totals)
            # As the parameters lie: or the compiler may add up whole gradients on every device.
            return found, jax.tree.map(lambda g, s: constrain(g, s.spec), grads, placed.params)

        if parts == 1:
            return value_and_grad(batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(part)), None

        # Every device keeps its own rows: microbatch a takes rows a, a + A, a + 2A, ...
        split = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zero = jnp.zeros(())
        found = {name: zero for name in ("nll", *weights)}
        # A parameter in bfloat16 has its parts added in float32.
        start = (zero, found), jax.tree.map(lambda p: at_least_float32(jnp.zeros_like(p)), params)
        found, grads = jax.lax.scan(add, start, split)[0]
        return found, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        batch = _cut(batch, mesh)
        (value, found), grads = gradients(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": value,
            **found,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        }
        return TrainState(params, opt_state, state.step + 1, state.key), metrics

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step,
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def make_eval_step(config: RunConfig, mesh: Mesh) -> Callable[[Any, Any], dict[str, Array]]:
    """Jitted `step(params, batch) -> numbers`: loss and sink statistics of one batch.

    Args:
      config: of the run.
      mesh: where the parameters live.

    Returns:
      A function of parameters and a batch. `nll` (nats per token) and, from the statistics that
      the model reduces inside its layers, for the token at position 0 of each row: `importance`
      [L, N] (mean attention from the queries that see it), `sink_rate` and
      `sink_rate_normalized` (per sample, `sink_epsilon`, raw and row-normalised weights),
      `first_token_share` [L], `value_drain` [L], `key_norm_ratio` [L], `residual_peak` [L, 2]
      (after attention, after MLP); and `entropy` [L, N] in nats, `activation_max` [L, 2],
      `activation_psi` [L, 2] (mean over rows of largest over median magnitude). With
      learned sink tokens position 0 is the first of them.
    """

    chunks = loss_chunks(config, mesh, config.data.batch_size)

    def step(params: Any, batch: Any) -> dict[str, Array]:
        batch = _cut(batch, mesh)
        output = _apply(config.model, params, batch, statistics=True)
        _, loss = _cross_entropy(config.model, params, output, batch, 0.0, chunks)
        return {"nll": loss["nll"]} | laid_out_by_compiler(
            lambda found, real: _sinks(found, real, config.sink_epsilon),
            PartitionSpec(),
            output.statistics,
            batch["segment_ids"] != 0,
        )

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
    return jax.jit(
        step,
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _tokens(name: str, batch: Any) -> Array:
    """How many tokens of a batch a mean is over: that of the loss, or of a penalty."""
    if name == "loss_mask":
        return batch["loss_mask"].sum().astype(jnp.float32)
    found = segments(batch["tokens"].shape, batch["positions"], batch["segment_ids"])
    return counted(name, found).sum().astype(jnp.float32)


def _cut(batch: Any, mesh: Mesh) -> Any:
    """The batch as the mesh cuts it; the layout of a NumPy array is in no type of an explicit mesh."""
    return jax.tree.map(lambda x: constrain(x, batch_sharding(mesh).spec), batch)


def _cross_entropy(
    config: DecoderConfig, params: Any, output: Any, batch: Any, z_loss: float, chunks: int
) -> tuple[Array, dict[str, Array]]:
    targets, mask = batch["targets"], batch["loss_mask"]
    if chunks == 1:
        return cross_entropy(output.logits, targets, mask, z_loss)
    # `output.logits` is read by nobody and never computed.
    tied = config.tied_head
    kernel = params["embedding"]["embedding"].T if tied else params["head"]["kernel"]
    return head_cross_entropy(
        output.hidden, kernel, targets, mask, z_loss, chunks=chunks, dtype=config.dtype
    )


def _apply(
    config: DecoderConfig,
    params: Any,
    batch: Any,
    statistics: bool = False,
    penalties: tuple[str, ...] = (),
) -> Any:
    return from_parameters(config, params)(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        statistics=statistics,
        penalties=penalties,
    )


def _sinks(found: dict[str, Array], real: Array, epsilon: float) -> dict[str, Array]:
    mass, normalized = found["key_mass"], found["key_mass_normalized"]
    count = found["key_count"]
    return {
        "importance": formulas.importance(mass, count)[..., 0].mean(axis=1),
        "sink_rate": formulas.sink_rate(mass, count, epsilon),
        "sink_rate_normalized": formulas.sink_rate(normalized, count, epsilon),
        "first_token_share": formulas.first_token_share_by_layer(mass, count),
        "value_drain": formulas.value_norm_drain(found["value_norm"], token_mask=real),
        "key_norm_ratio": formulas.key_norm_ratio(found["key_norm"], token_mask=real),
        "residual_peak": formulas.residual_peak(found["residual_norm"], token_mask=real),
        "entropy": formulas.entropy_by_head(found["entropy"], query_mask=real),
        "activation_max": found["residual_top"][..., 0].max(axis=1),
        "activation_psi": psi(found["residual_top"], found["residual_median"]).mean(axis=1),
    }
