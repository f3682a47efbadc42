"""The real training step and decode step, on shapes alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sinkjax.models.parameters import abstract, from_parameters, parameters
from sinkjax.plan.job import Job
from sinkjax.sharding import (
    batch_sharding,
    cache_shardings,
    make_mesh,
    resident,
    row_sharding,
    shardings,
)
from sinkjax.stream.structure import whole_logits

# Every one is an int32 array [B, T], see `sinkjax.train.data`.
_BATCH = ("tokens", "targets", "positions", "segment_ids", "loss_mask")


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that can be lowered.

    Args:
      function: jitted.
      arguments: shapes, dtypes and layouts.
      mesh: current while it is traced.
      held: bytes of the arguments on one device by kind: parameters, optimiser, cache, batch.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    held: dict[str, int]


def build(job: Job, devices: Any) -> Step:
    """The step of a job for some devices, which need not be there.

    Raises:
      ValueError: mesh, batch and model do not fit one another.
    """
    axes = job.run.mesh
    mesh = make_mesh(
        axes.data,
        axes.model,
        expert=axes.expert,
        sequence=axes.sequence,
        devices=devices,
        explicit=axes.explicit,
    )
    return _train(job, mesh) if job.ring is None else _decode(job, mesh)


def _train(job: Job, mesh: Mesh) -> Step:
    from sinkjax.train.step import abstract_state, make_train_step

    run, length = job.run, job.run.model.context_length
    layout = batch_sharding(mesh)
    shard = layout.shard_shape((mesh.size, mesh.size))
    sizes = {"batch": job.rows, "context-length": length}
    for (name, size), part in zip(sizes.items(), shard, strict=True):
        parts = mesh.size // part
        if size % parts:
            raise ValueError(f"{name}: expected a multiple of {parts} on this mesh, got {size}")
    with jax.set_mesh(mesh):
        state = abstract_state(run, mesh)
        batch = {
            name: jax.ShapeDtypeStruct((job.rows, length), jnp.int32, sharding=layout)
            for name in _BATCH
        }
        step = make_train_step(run, mesh)
    held = {
        "parameters": nbytes(state.params),
        "optimiser": nbytes(state.opt_state),
        "batch": nbytes(batch),
    }
    return Step(step, (state, batch), mesh, held)


def _decode(job: Job, mesh: Mesh) -> Step:
    """Greedy. Layers are unrolled: a stack would be sliced at every token; parameters are bfloat16."""
    assert job.ring is not None
    config = dataclasses.replace(
        job.run.model, scan_layers=False, remat="none", dtype="bfloat16", param_dtype="bfloat16"
    )
    decoder = abstract(config)
    shapes = parameters(decoder)
    params = _placed(shapes, shardings(shapes, mesh, resident()))
    description = job.ring.description
    cache = jax.eval_shape(lambda: decoder.init_cache(description, job.rows))
    layout, rows = cache_shardings(cache, mesh), row_sharding(mesh)
    parts = mesh.size // rows.shard_shape((mesh.size,))[0]
    if job.rows % parts:
        raise ValueError(f"batch: expected a multiple of {parts} on this mesh, got {job.rows}")
    tokens = jax.ShapeDtypeStruct((job.rows, 1), jnp.int32, sharding=rows)

    @functools.partial(jax.jit, donate_argnames=("cache",), out_shardings=(rows, layout))
    def step(params, cache, tokens):
        output = from_parameters(config, params)(tokens, cache=cache)
        return jnp.argmax(whole_logits(output.logits[:, -1]), axis=-1), output.cache

    cache = _placed(cache, layout)
    held = {"parameters": nbytes(params), "cache": nbytes(cache), "batch": nbytes(tokens)}
    return Step(step, (params, cache, tokens), mesh, held)


def _placed(tree: Any, layout: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, layout
    )


def nbytes(tree: Any) -> int:
    """Bytes of one device's part of some arrays."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding is not None
    )
