"""The library's step compiled for TPU chips that are not there: nothing large moves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.cache import SinkWindow
from sinkjax.models import DecoderConfig, from_parameters, parameters
from sinkjax.models.parameters import abstract
from sinkjax.sharding import cache_shardings, make_mesh, resident, row_sharding, shardings
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.steps import functions
from sinkjax.stream.structure import split

CONFIG = DecoderConfig(
    vocab_size=8192,
    model_dim=384,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=640,
    context_length=512,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
ROWS = 6
COLLECTIVE = r" = (.*?) (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\S*\("


@pytest.mark.tpu_aot
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_a_step_moves_neither_cache_nor_weights(explicit):
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(2, 4, devices=chips, explicit=explicit)

    def placed(tree, layout):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, layout
        )

    shapes = parameters(abstract(CONFIG))
    params = placed(shapes, shardings(shapes, mesh, resident()))
    model = from_parameters(CONFIG, params)
    structure, arrays = split(model)
    assert structure.mesh == mesh
    cache = jax.eval_shape(lambda: model.init_cache(SinkWindow(4, 508), ROWS))
    cache = placed(cache, cache_shardings(cache, mesh))
    rows = (((ROWS, 1), jnp.int32), ((ROWS, 2), jnp.uint32), ((ROWS,), jnp.bool_))
    rows = [jax.ShapeDtypeStruct(*row, sharding=row_sharding(mesh)) for row in rows]
    _, step = functions(structure, Sampler(top_k=7), ())
    with jax.set_mesh(mesh):
        program = step.__wrapped__.lower(arrays, cache, *rows).compile()
    moved = re.findall(COLLECTIVE, program.as_text())
    sizes = [
        max(int(np.prod(list(map(int, s.split(","))))) for s in re.findall(r"\[([\d,]+)\]", shape))
        for shape in moved
    ]
    # Activations of the model's width and logits, of the rows of a device; and whole rows of ids.
    assert sizes and max(sizes) <= ROWS // 2 * CONFIG.vocab_size
    held = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(cache)
    )
    assert program.memory_analysis().alias_size_in_bytes >= held
