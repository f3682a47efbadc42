"""The learned leaves that variants put around one attention call, each with its own few numbers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sinkjax.modules.attention_config import AttentionConfig
from sinkjax.modules.projection import Projection
from sinkjax.ops.differential import LAMBDA_STD, differential_lambda
from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.slots import SlotMode, SlotPosition, Slots


def float_type(config: AttentionConfig) -> jnp.dtype:
    """The type of leaves that are too few to be worth rounding: float32 at least."""
    return jnp.promote_types(config.param_dtype, jnp.float32)


class Constants(nnx.Module):
    """The constants of a normaliser, learned per query head as what is added to them.

    Parameters: one [N] per name of ``Normalizer.parameters``, zeros: starts as the description.
    """

    def __init__(self, config: AttentionConfig):
        self.names = config.described_normalizer.parameters
        for name in self.names:
            setattr(self, name, nnx.Param(jnp.zeros((config.num_heads,), float_type(config))))

    def __call__(self) -> dict[str, Float[Array, " N"]]:
        """The leaves by name, as `dot_product_attention` takes them."""
        return {name: getattr(self, name)[...] for name in self.names}


class KeyValueBias(nnx.Module):
    """Learned keys and values that every query sees, `num_kv_biases` per key/value head.

    Parameters: ``key`` and ``value`` [K, m, H] as the config's kv_bias asks, N(0, init_std).

    Source: Sun et al. 2024, arXiv 2402.17762; key alone: Gu et al. 2024, arXiv 2410.10781.
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        shape = (config.num_kv_heads, config.num_kv_biases, config.head_dim)
        for name, owners in (
            ("key", ("key", "key_value", "context")),
            ("value", ("value", "key_value", "context")),
        ):
            if config.kv_bias in owners:
                draw = jax.random.normal(rngs.params(), shape, float_type(config))
                setattr(self, name, nnx.Param(draw * config.init_std))

    def __call__(self, mode: SlotMode, position: SlotPosition) -> Slots:
        """The learned arrays as `sinkjax.ops.slots` takes them."""
        key, value = (getattr(self, name, None) for name in ("key", "value"))
        return Slots(
            None if key is None else key[...],
            None if value is None else value[...],
            mode,
            position,
        )


class ForgetGate(Projection):
    """The scores of a forget gate per token and head: x W + b, for `sinkjax.ops.log_forget`.

    Parameters: ``kernel`` [D, N], ``bias`` [N] zeros.

    Source: Lin et al. 2025, arXiv 2503.02130.
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        super().__init__(
            "BTD,DN->BTN",
            (config.model_dim, config.num_heads),
            init_std=config.init_std,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.bias = nnx.Param(jnp.zeros((config.num_heads,), float_type(config)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        return at_least_float32(super().__call__(x)) + self.bias[...]


class Lambda(nnx.Module):
    """How much of the second map is subtracted, and the gain after: differential attention.

    Parameters: ``query_1 key_1 query_2 key_2`` [H], N(0, 0.1); ``scale`` [2 H] ones.

    Source: Ye et al. 2024, arXiv 2410.05258.
    """

    def __init__(self, config: AttentionConfig, rngs: nnx.Rngs):
        H, dtype = config.head_dim, float_type(config)

        def draw() -> nnx.Param:
            return nnx.Param(LAMBDA_STD * jax.random.normal(rngs.params(), (H,), dtype))

        self.query_1, self.key_1, self.query_2, self.key_2 = draw(), draw(), draw(), draw()
        self.scale = nnx.Param(jnp.ones((2 * H,), dtype))

    def __call__(self) -> Float[Array, ""]:
        """The factor of the second map."""
        return differential_lambda(
            self.query_1[...], self.key_1[...], self.query_2[...], self.key_2[...]
        )
