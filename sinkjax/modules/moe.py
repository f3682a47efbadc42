"""The feed-forward half of a block as a mixture of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sinkjax.modules.mlp import ACTIVATIONS, MLPVariant
from sinkjax.modules.projection import contract
from sinkjax.modules.tap import tap
from sinkjax.ops import moe
from sinkjax.ops.precision import at_least_float32


class _Weights(nnx.Module):
    """``kernel`` and, where asked for, ``bias``, whose dimensions are those of the kernel but one."""

    def __init__(self, shape, bias, init_std, param_dtype, rngs):
        normal = jax.random.normal(rngs.params(), shape, jnp.dtype(param_dtype))
        self.kernel = nnx.Param(normal * jnp.asarray(init_std, normal.dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), param_dtype))


class _Experts(nnx.Module):
    def __init__(self, E, D, F, **rest):
        self.gate = _Weights((E, D, F), **rest)
        self.up = _Weights((E, D, F), **rest)
        self.down = _Weights((E, F, D), **rest)


class MoE(nnx.Module):
    """E feed-forward layers, of which each token goes through the k that its router scores highest.

    z = x W_router;  y = sum over the chosen e of softmax(z_chosen)_e MLP_e(x)

    One wants it because parameters grow with E and arithmetic with k. Nothing is dropped
    (`sinkjax.ops.moe.mixture`), and the router computes in float32 whatever ``dtype``.

    Parameters: ``router/kernel`` [D, E], ``experts/gate/kernel`` and ``experts/up/kernel``
    [E, D, F], ``experts/down/kernel`` [E, F, D]; with ``mlp_bias`` a ``bias`` beside each: [E],
    [E, F], [E, F], [E, D].
    Taps: ``router_logits`` [B, T, E].

    Args:
      model_dim: D, width of input and output.
      mlp_dim: F, width inside one expert.
      variant: how many experts, how many per token, activation and biases.
      init_std: standard deviation of the normal initialisation of all kernels.
      dtype: of the computation but the router's.
      param_dtype: of the parameters.

    Source: Shazeer et al., arXiv 1701.06538; Jiang et al., arXiv 2401.04088 (Mixtral).
    """

    def __init__(
        self,
        model_dim: int,
        mlp_dim: int,
        variant: MLPVariant,
        *,
        init_std: float = 0.02,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.variant = variant
        self.dtype = dtype
        rest = dict(bias=variant.mlp_bias, init_std=init_std, param_dtype=param_dtype, rngs=rngs)
        self.router = _Weights((model_dim, variant.num_experts), **rest)
        self.experts = _Experts(variant.num_experts, model_dim, mlp_dim, **rest)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        statistics: bool = False,
        penalties: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The layer's output, and what was asked for by name.

        Args:
            x: [B, T, D].
            mask: [B, T], tokens that count in what is measured; all by default.
            statistics: also ``expert_share`` [B, E], what part of the row's choices each expert got.
            penalties: some of ``load_balancing`` and ``router_z_loss`` (`sinkjax.ops.moe`), scalars.
        """
        logits = self._logits(x)
        tap(self, "router_logits", logits)
        weights, experts = moe.route(logits, self.variant.num_experts_per_token)
        kernels = {}
        for name in ("gate", "up", "down"):
            found = getattr(self.experts, name)
            kernels[name] = found.kernel[...]
            if self.variant.mlp_bias:
                kernels[f"{name}_bias"] = found.bias[...]
        activation = ACTIVATIONS[self.variant.mlp_activation]
        out = moe.mixture(x.astype(self.dtype), weights, experts, kernels, activation)
        reduced = {}
        if statistics:
            counts = jax.lax.stop_gradient(moe.expert_counts(experts, logits.shape[-1]))
            if mask is not None:
                counts = jnp.where(mask[..., None], counts, 0)
            total = counts.sum(axis=1)
            reduced["expert_share"] = total / jnp.maximum(total.sum(axis=-1, keepdims=True), 1)
        if "load_balancing" in penalties:
            reduced["load_balancing"] = moe.load_balancing_loss(logits, experts, mask)
        if "router_z_loss" in penalties:
            reduced["router_z_loss"] = moe.router_z_loss(logits, mask)
        return out, reduced

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        kernel = at_least_float32(self.router.kernel[...])
        # A TPU would otherwise take bfloat16 for a product in float32, and choose other experts.
        with jax.default_matmul_precision("highest"):
            logits = contract("BTD,DE->BTE", x.astype(kernel.dtype), kernel)
        return (
            logits + self.router.bias[...].astype(logits.dtype) if self.variant.mlp_bias else logits
        )
