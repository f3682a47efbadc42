"""The gated feed-forward half of a block."""

from flax import nnx
from jaxtyping import Array, Float

from sinkjax.modules.projection import Projection
from sinkjax.ops.activations import swiglu


class MLP(nnx.Module):
    """SwiGLU feed-forward layer.

    y = (silu(x W_gate) * (x W_up)) W_down

    Args:
      model_dim: D, width of input and output.
      mlp_dim: F, width inside.
      init_std: standard deviation of the normal initialisation of all three kernels.
      dtype: of the computation.
      param_dtype: of the kernels.

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6.
    """

    def __init__(
        self,
        model_dim: int,
        mlp_dim: int,
        *,
        init_std: float = 0.02,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        def projection(equation: str, *shape: int) -> Projection:
            return Projection(
                equation, shape, init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate = projection("BTD,DF->BTF", model_dim, mlp_dim)
        self.up = projection("BTD,DF->BTF", model_dim, mlp_dim)
        self.down = projection("BTF,FD->BTD", mlp_dim, model_dim)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(swiglu(self.gate(x), self.up(x)))
