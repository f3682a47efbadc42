"""The gated feed-forward half of a block."""

import dataclasses
from typing import Literal, get_args

from flax import nnx
from jaxtyping import Array, Float

from sinkjax.modules.projection import Projection
from sinkjax.ops.activations import clamped_swiglu, swiglu

MLPActivation = Literal["swiglu", "clamped_swiglu"]
ACTIVATIONS = {"swiglu": swiglu, "clamped_swiglu": clamped_swiglu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPVariant:
    """What a feed-forward layer is made of, everything but sizes of the stream.

    Args:
        num_experts: E, feed-forward layers of which each token chooses some; 0: one for all tokens.
        num_experts_per_token: k, how many it chooses.
        mlp_activation: SwiGLU, or the clamped one of gpt-oss.
        mlp_bias: biases in router and experts; only with experts.

    Raises:
        ValueError: names the field, what was expected and what came.
    """

    num_experts: int = 0
    num_experts_per_token: int = 2
    mlp_activation: MLPActivation = "swiglu"
    mlp_bias: bool = False

    def check(self) -> None:
        """Raise where the fields do not fit together."""
        E, k = self.num_experts, self.num_experts_per_token
        if E < 0:
            raise ValueError(f"num_experts: expected at least 0, got {E}")
        if k < 1 or (E and k > E):
            most = f"to num_experts={E}" if E else "or more"
            raise ValueError(f"num_experts_per_token: expected 1 {most}, got {k}")
        if self.mlp_activation not in ACTIVATIONS:
            expected = ", ".join(get_args(MLPActivation))
            raise ValueError(
                f"mlp_activation: expected one of {expected}; got {self.mlp_activation!r}"
            )
        if self.mlp_bias and not E:
            raise ValueError("mlp_bias: expected False without experts, got True")

    @property
    def mlp(self) -> "MLPVariant":
        """These fields alone."""
        fields = dataclasses.fields(MLPVariant)
        return MLPVariant(**{field.name: getattr(self, field.name) for field in fields})


class MLP(nnx.Module):
    """SwiGLU feed-forward layer.

    y = (silu(x W_gate) * (x W_up)) W_down

    Args:
      model_dim: D, width of input and output.
      mlp_dim: F, width inside.
      activation: of gate and up, as in `MLPVariant`.
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
        activation: MLPActivation = "swiglu",
        init_std: float = 0.02,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        def projection(equation: str, *shape: int) -> Projection:
            return Projection(
                equation, shape, init_std=init_std, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.activation = activation
        self.gate = projection("BTD,DF->BTF", model_dim, mlp_dim)
        self.up = projection("BTD,DF->BTF", model_dim, mlp_dim)
        self.down = projection("BTF,FD->BTD", mlp_dim, model_dim)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(self.inside(x))

    def inside(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """What the down projection is given."""
        return ACTIVATIONS[self.activation](self.gate(x), self.up(x))
