"""Embedding projections: what they add to a model, and that they can be folded away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.models import Decoder, DecoderConfig, merge_embedding_projection, parameters

CONFIG = DecoderConfig(
    vocab_size=31,
    model_dim=22,
    num_layers=1,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=37,
    context_length=16,
    embedding_projection=True,
    init_std=0.2,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 7)))
forward = jax.jit(lambda model: model(TOKENS))


def test_two_orthogonal_matrices_are_all_that_is_added():
    params = parameters(Decoder(CONFIG, rngs=nnx.Rngs(3)))
    plain = dataclasses.replace(CONFIG, embedding_projection=False)
    without = parameters(Decoder(plain, rngs=nnx.Rngs(3)))
    matrices = [params.pop(f"{name}_projection")["kernel"] for name in ("embedding", "head")]
    jax.tree.map(np.testing.assert_array_equal, params, without)
    for matrix in matrices:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(22), atol=1e-5)
    assert not np.allclose(*matrices, atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_the_same_function(tied):
    model = Decoder(dataclasses.replace(CONFIG, tied_head=tied), rngs=nnx.Rngs(0))
    merged = merge_embedding_projection(model)
    output = forward(model)
    assert merged.config == dataclasses.replace(CONFIG, embedding_projection=False, tied_head=False)
    assert set(parameters(merged)) == {"embedding", "blocks", "final_norm", "head"}
    np.testing.assert_allclose(forward(merged).logits, output.logits, atol=1e-4)
    # Before as after, the head gives the logits of the hidden states that the model hands out.
    np.testing.assert_allclose(model.head(output.hidden), output.logits, atol=1e-5)
    # The projections do something: E P_E is what the first block reads.
    table = parameters(model)["embedding"]["embedding"]
    np.testing.assert_allclose(merged.embed(TOKENS), model.embed(TOKENS), atol=1e-5)
    assert not np.allclose(model.embed(TOKENS), table[TOKENS], atol=0.1)


def test_a_model_without_projections_comes_back():
    plain = Decoder(dataclasses.replace(CONFIG, embedding_projection=False), rngs=nnx.Rngs(0))
    assert merge_embedding_projection(plain) is plain
