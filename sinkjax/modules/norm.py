"""Normalisation layers: one for each name that ``config.norm`` may have."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sinkjax.modules.variant import LayerVariant
from sinkjax.ops.norms import (
    dynamic_tanh,
    gated_norm,
    pre_affine_norm,
    rms_norm,
    single_scale_norm,
)

GATED_NORM_RANK = 16
"""Width of the gate of `GatedNorm`; Qiu et al., arXiv 2601.22966."""


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
        self.scale = _ones((size,), param_dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale[...], self.epsilon).astype(x.dtype)


class SingleScaleNorm(nnx.Module):
    """RMSNorm with one gain for all channels; see `sinkjax.ops.norms.single_scale_norm`.

    Parameter ``scale`` [], 1 at the start. Arguments as for `RMSNorm`; the size plays no part.
    """

    def __init__(self, *, epsilon: float, param_dtype: str = "float32"):
        self.epsilon = epsilon
        self.scale = _ones((), param_dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return single_scale_norm(x, self.scale[...], self.epsilon)


class PreAffineNorm(nnx.Module):
    """RMSNorm with gains before and after it; see `sinkjax.ops.norms.pre_affine_norm`.

    Parameters ``pre_scale`` [D] and ``scale`` [D], ones. Arguments as for `RMSNorm`.
    """

    def __init__(self, size: int, *, epsilon: float, param_dtype: str = "float32"):
        self.epsilon = epsilon
        self.pre_scale = _ones((size,), param_dtype)
        self.scale = _ones((size,), param_dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return pre_affine_norm(x, self.pre_scale[...], self.scale[...], self.epsilon)


class GatedNorm(nnx.Module):
    """RMSNorm behind a low-rank gate of itself; see `sinkjax.ops.norms.gated_norm`.

    Parameters ``scale`` [D], ones, ``down`` [D, R] and ``up`` [R, D], N(0, init_std).

    Args:
      size, epsilon, param_dtype: as for `RMSNorm`; ``down`` and ``up`` are stored in param_dtype.
      rank: R.
      init_std: standard deviation of both kernels at the start.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        size: int,
        *,
        epsilon: float,
        rank: int = GATED_NORM_RANK,
        init_std: float,
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        def normal(*shape: int) -> nnx.Param:
            draw = jax.random.normal(rngs.params(), shape, jnp.dtype(param_dtype))
            return nnx.Param(draw * jnp.asarray(init_std, draw.dtype))

        self.epsilon = epsilon
        self.scale = _ones((size,), param_dtype)
        self.down = normal(size, rank)
        self.up = normal(rank, size)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return gated_norm(x, self.scale[...], self.down[...], self.up[...], self.epsilon)


class DynamicTanh(nnx.Module):
    """A squashing function in the place of a norm; see `sinkjax.ops.norms.dynamic_tanh`.

    Parameters ``alpha`` [] 0.5, ``scale`` [D] ones, ``bias`` [D] zeros.

    Args:
      size, param_dtype: as for `RMSNorm`.
    """

    def __init__(self, size: int, *, param_dtype: str = "float32"):
        float_type = jnp.promote_types(param_dtype, jnp.float32)
        self.alpha = nnx.Param(jnp.full((), 0.5, float_type))
        self.scale = _ones((size,), param_dtype)
        self.bias = nnx.Param(jnp.zeros((size,), float_type))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return dynamic_tanh(x, self.alpha[...], self.scale[...], self.bias[...])


Norm: TypeAlias = RMSNorm | SingleScaleNorm | PreAffineNorm | GatedNorm | DynamicTanh


def make_norm(size: int, config: LayerVariant, rngs: nnx.Rngs) -> Norm:
    """The norm that a config names, for the residual stream.

    Args:
      size: D, length of the last dimension.
      config: its ``norm``, ``norm_epsilon``, ``init_std`` and ``param_dtype``.
      rngs: source of the initial parameters; only ``"gated"`` draws.

    Raises:
      ValueError: no norm of that name.
    """
    epsilon, param_dtype = config.norm_epsilon, config.param_dtype
    if config.norm == "rms":
        return RMSNorm(size, epsilon=epsilon, param_dtype=param_dtype)
    if config.norm == "single_scale":
        return SingleScaleNorm(epsilon=epsilon, param_dtype=param_dtype)
    if config.norm == "pre_affine":
        return PreAffineNorm(size, epsilon=epsilon, param_dtype=param_dtype)
    if config.norm == "gated":
        return GatedNorm(
            size, epsilon=epsilon, init_std=config.init_std, param_dtype=param_dtype, rngs=rngs
        )
    if config.norm == "dynamic_tanh":
        return DynamicTanh(size, param_dtype=param_dtype)
    raise ValueError(
        "norm: expected one of rms, single_scale, pre_affine, gated, dynamic_tanh; "
        f"got {config.norm!r}"
    )


def _ones(shape: tuple[int, ...], param_dtype: str) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.promote_types(param_dtype, jnp.float32)))
