"""Folding training-time matrices into the ones that stay."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import from_parameters, parameters


def merge_embedding_projection(model: Decoder) -> Decoder:
    r"""The same model without its embedding projections, folded into embedding and head.

    $$ E' = E P_E, \qquad W' = P_W W $$

    Why: the projections are there for the optimiser. Without them a step costs two matrices less
    and the checkpoint is an ordinary decoder. Logits are the same up to one rounding of the
    parameters; `Output.hidden` is then the one before the folded matrix. A tied head becomes a
    matrix of its own, since the two products differ.

    Args:
      model: with ``embedding_projection``; without, it comes back as it is.

    Source: Park et al., arXiv:2506.19697 (EmbProj is mergeable).
    """
    if not model.config.embedding_projection:
        return model
    params = parameters(model)
    into, out = (params.pop(f"{name}_projection")["kernel"] for name in ("embedding", "head"))
    table = params["embedding"]["embedding"]
    head = table.T if model.config.tied_head else params["head"]["kernel"]
    params["embedding"] = {"embedding": _product(table, into)}
    params["head"] = {"kernel": _product(out, head)}
    config = dataclasses.replace(model.config, embedding_projection=False, tied_head=False)
    return from_parameters(config, params)


def _product(a: Float[Array, "M D"], b: Float[Array, "D K"]) -> Float[Array, "M K"]:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return product.astype(a.dtype)
