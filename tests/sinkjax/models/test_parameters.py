"""Parameters as plain dicts, there and back, and the refusal of what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, abstract, count, from_parameters, parameters, preset

CONFIG = dataclasses.replace(preset("tiny"), num_layers=1)


def test_there_and_back():
    model = Decoder(CONFIG, rngs=nnx.Rngs(3))
    again = from_parameters(CONFIG, parameters(model))
    tokens = jnp.arange(7)[None]
    np.testing.assert_array_equal(again(tokens).logits, model(tokens).logits)
    assert count(CONFIG) == sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters(model))
    assert (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters(abstract(CONFIG))) == shapes
    )


def test_inside_jit_arrays_are_traced():
    params = parameters(Decoder(CONFIG, rngs=nnx.Rngs(3)))
    tokens = jnp.arange(7)[None]

    @jax.jit
    def loss(params):
        return from_parameters(CONFIG, params)(tokens).logits.sum()

    gradient = jax.grad(loss)(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert jnp.abs(gradient["head"]["kernel"]).sum() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mlp_dim=37), r"blocks/0/mlp/down/kernel: expected \(37, 64\), got \(172, 64\)"),
        (dict(sinks=True), r"blocks/0/attention/sinks: expected \(1,\), got none"),
        (dict(tied_head=True), r"head/kernel: expected no such parameter, got \(64, 257\)"),
    ],
)
def test_another_shape_names_the_first_parameter(change, words):
    params = parameters(abstract(CONFIG))
    with pytest.raises(ValueError, match=words):
        from_parameters(dataclasses.replace(CONFIG, **change), params)


def test_parameters_carry_no_sharding_of_their_own():
    """A model built in a bare notebook cell: annotated parameters would raise without a mesh."""
    for scanned in (False, True):
        model = Decoder(dataclasses.replace(CONFIG, scan_layers=scanned), rngs=nnx.Rngs(0))
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            annotations = {"out_sharding", "sharding", "sharding_names", "sharding_rules"}
            assert not annotations & set(variable.get_metadata()), path
