"""Root-mean-square normalisation with a learned gain."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sinkjax.ops.norms import rms_norm


class RMSNorm(nnx.Module):
    """RMSNorm over the last dimension.

    y = scale * x / sqrt(mean(x²) + epsilon)

    Args:
      size: length of the last dimension.
      epsilon: added to the mean square.
      param_dtype: the gain is stored in this type, float32 at least.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    """

    def __init__(self, size: int, *, epsilon: float, param_dtype: str = "float32"):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((size,), jnp.promote_types(param_dtype, jnp.float32)))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.epsilon).astype(x.dtype)
