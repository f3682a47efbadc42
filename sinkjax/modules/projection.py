"""A linear map between named dimensions."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Projection(nnx.Module):
    """Bias-free linear map written as an einsum.

    y = einsum(equation, x, kernel)

    One wants it because attention kernels keep their heads as a dimension of their own, [D, N, H]:
    sharding rules and optimisers then see heads, not a flattened product.

    Args:
      equation: einsum of the input and the kernel, for example ``"BTD,DNH->BTNH"``.
      shape: shape of the kernel.
      init_std: standard deviation of the normal initialisation.
      dtype: of the computation and the result.
      param_dtype: of the stored kernel.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        *,
        init_std: float,
        dtype: str,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        self.equation = equation
        self.dtype = dtype
        normal = jax.random.normal(rngs.params(), shape, jnp.dtype(param_dtype))
        self.kernel = nnx.Param(normal * jnp.asarray(init_std, normal.dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.kernel[...].astype(self.dtype)
        return contract(self.equation, x.astype(self.dtype), kernel)


def contract(
    equation: str,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    *,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Einsum of an activation and a kernel that may be cut over a mesh.

    On a mesh with explicit axes a sum over a dimension that both cut is an error until the layout
    of the result is given; on every other mesh giving one is. Here each dimension of the result
    keeps the layout it has in ``x``, or else in the kernel, each axis used once.

    Args:
        equation: two operands, one letter per dimension: ``"BTNH,NHD->BTD"``.
        x: the activation.
        kernel: the parameter.
        preferred_element_type: accumulate in and return this type.
    """
    layout = jax.typeof(x).sharding
    if equation == "BTNH,NHD->BTD" and layout.mesh.empty:
        # As one summed dimension: XLA on CPU transposes the kernel in every call otherwise.
        B, T, N, H = x.shape
        return contract(
            "BTM,MD->BTD",
            x.reshape(B, T, N * H),
            kernel.reshape(N * H, -1),
            preferred_element_type=preferred_element_type,
        )
    out = None
    if AxisType.Explicit in layout.mesh.axis_types:
        operands, result = equation.split("->")
        of_x, of_kernel = operands.split(",")
        known = dict(zip(of_kernel, jax.typeof(kernel).sharding.spec, strict=True))
        known |= dict(zip(of_x, layout.spec, strict=True))
        entries, used = [], set()
        for letter in sorted(result, key=lambda letter: letter not in of_x):
            axes = known[letter] if isinstance(known[letter], tuple) else (known[letter],)
            free = None not in axes and used.isdisjoint(axes)
            used |= set(axes) if free else set()
            entries.append((result.index(letter), known[letter] if free else None))
        out = PartitionSpec(*(entry for _, entry in sorted(entries, key=lambda e: e[0])))
    return jnp.einsum(
        equation, x, kernel, preferred_element_type=preferred_element_type, out_sharding=out
    )
