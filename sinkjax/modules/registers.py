"""Registers: learned embeddings beside the tokens, whose outputs are thrown away."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float


class Registers(nnx.Module):
    """R learned tokens that a model without a causal mask may use as it likes.

    x <- [x, embedding];  ...;  x <- x without the last R

    One wants them because vision transformers turn patches of little content into stores of global
    information, with norms and attention far above the others; given registers they use those.

    They come after the tokens, so that a token keeps its index, with and without registers.
    They have no position: add position embeddings before, and give a rotary embedding a position
    for them as the model sees fit. Under a causal mask no token would see them.

    Parameter: ``embedding`` [R, D].

    Args:
        count: R; 4 in the source.
        model_dim: D.
        init_std: standard deviation of the normal initialisation.
        param_dtype: of the stored embeddings.
        rngs: source of the initial parameters.

    Raises:
        ValueError: ``count`` below 1.

    Source: Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588.
    """

    def __init__(
        self,
        count: int,
        model_dim: int,
        *,
        init_std: float = 0.02,
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        self.count = count
        normal = jax.random.normal(rngs.params(), (count, model_dim), jnp.dtype(param_dtype))
        self.embedding = nnx.Param(normal * jnp.asarray(init_std, normal.dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T_R D"]:
        """The tokens and after them the registers, in the type of ``x``."""
        rows = jnp.broadcast_to(
            self.embedding[...].astype(x.dtype), (len(x), *self.embedding.shape)
        )
        layout = jax.typeof(x).sharding
        if AxisType.Explicit in layout.mesh.axis_types:
            # What is joined must be laid out alike.
            rows = jax.sharding.reshard(rows, layout.spec)
        return jnp.concatenate([x, rows], axis=1)

    def drop(self, x: Float[Array, "B T_R D"]) -> Float[Array, "B T D"]:
        """The tokens alone.

        Raises:
            ValueError: ``x`` is no longer than the registers.
        """
        if x.shape[1] <= self.count:
            raise ValueError(f"x: expected more than {self.count} tokens, got shape {x.shape}")
        return x[:, : -self.count]
