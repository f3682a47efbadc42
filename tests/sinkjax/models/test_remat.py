"""What the backward pass computes again, read from the traced program."""

import jax
import jax.numpy as jnp

from sinkjax.models.config import DecoderConfig, Remat
from sinkjax.models.parameters import abstract, from_parameters, parameters


def _gradient(remat: Remat) -> str:
    config = DecoderConfig(
        vocab_size=67,
        model_dim=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        mlp_dim=34,
        context_length=13,
        scan_layers=True,
        remat=remat,
        sinks=True,
    )
    tokens = jnp.arange(26).reshape(2, 13)

    def loss(params):
        return from_parameters(config, params)(tokens).hidden.sum()

    return str(jax.make_jaxpr(jax.grad(loss))(parameters(abstract(config))))


def test_attention_is_not_run_again_when_it_is_kept() -> None:
    modes: tuple[Remat, ...] = ("none", "full", "attention")
    found = {remat: _gradient(remat) for remat in modes}
    # Exponentials are those of attention alone, products also those of the projections.
    exponentials = {remat: text.count(" exp ") for remat, text in found.items()}
    products = {remat: text.count("dot_general") for remat, text in found.items()}
    assert exponentials["attention"] == exponentials["none"] < exponentials["full"], exponentials
    assert products["none"] < products["attention"] == products["full"] - 2, products
