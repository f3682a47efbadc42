"""A pre-norm decoder-only language model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from sinkjax.cache import Cache, Description, LayerSpec, create
from sinkjax.models.config import DecoderConfig
from sinkjax.models.output import Output
from sinkjax.modules.block import Block
from sinkjax.modules.norm import RMSNorm
from sinkjax.modules.projection import contract
from sinkjax.sharding import constrain, take_rows


class Embedding(nnx.Module):
    """Token table ``embedding`` [V, D]; an id outside the vocabulary gives NaN, not a neighbour."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        shape = (config.vocab_size, config.model_dim)
        self.embedding = nnx.Param(_normal(rngs, shape, config))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return take_rows(self.embedding[...], tokens, mode="fill").astype(self.dtype)


class Head(nnx.Module):
    """Output matrix ``kernel`` [D, V] of an untied head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        shape = (config.model_dim, config.vocab_size)
        self.kernel = nnx.Param(_normal(rngs, shape, config))

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return _logits("BTD,DV->BTV", hidden, self.kernel[...], self.dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], config: DecoderConfig) -> Array:
    normal = jax.random.normal(rngs.params(), shape, jnp.dtype(config.param_dtype))
    return normal * jnp.asarray(config.init_std, normal.dtype)


def _logits(equation: str, hidden: Array, kernel: Array, dtype: str) -> Array:
    return contract(
        equation,
        hidden.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


class Decoder(nnx.Module):
    """Embedding, L pre-norm blocks, a norm and a head.

    hidden = norm(block_L(... block_1(E[tokens]))); logits = hidden W, or hidden Eᵀ when tied

    One wants it because every sink variant, window pattern and cache policy of the library can be
    trained, streamed and measured on this one model.

    Parameters: ``embedding/embedding`` [V, D], ``blocks/{i}/...``, ``final_norm/scale`` [D],
    ``head/kernel`` [D, V] (absent when tied). With ``scan_layers`` the list ``blocks`` runs over
    the repeating pattern of windows and every leaf has a leading axis [L / len(windows)].
    The same seed gives the same parameters, stacked or not.

    Args:
        config: the description.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        # One key per layer, whatever the layout, so that a seed names one model.
        keys = jax.random.split(rngs.params(), config.num_layers)
        if config.scan_layers:
            pattern = len(config.windows)
            self.blocks = nnx.List(
                [
                    jax.vmap(lambda key, i=i: _block(config, i, key))(keys[i::pattern])
                    for i in range(pattern)
                ]
            )
        else:
            self.blocks = nnx.List([_block(config, i, key) for i, key in enumerate(keys)])
        self.final_norm = RMSNorm(
            config.model_dim, epsilon=config.norm_epsilon, param_dtype=config.param_dtype
        )
        if not config.tied_head:
            # Shadows the method: `model.head(hidden)` either way, and the matrix is head/kernel.
            self.head = Head(config, rngs=rngs)  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        cache: Cache | None = None,
        statistics: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] ids.
            positions: [B, T] or [T] in tokens, −1 is padding. None: the index in the row, or with
                a cache the next ones of its clock.
            segment_ids: [B, T] or [T]; segments of one row do not see each other.
            cache: tokens seen before, from `init_cache`; the result holds the one that follows.
            statistics: also reduce per-layer attention and residual statistics (`Attention`,
                `Block`); with a cache those of the residual stream only.

        Returns:
            `Output`; statistics have a leading layer axis in the order of the layers.

        Raises:
            ValueError: a cache together with segment_ids.
        """
        x = _keep_rows(self.embedding(tokens))
        if cache is not None:
            if segment_ids is not None:
                raise ValueError(
                    "segment_ids: expected None with a cache, one stream per row; "
                    f"got {segment_ids.shape}"
                )
            if positions is None:
                positions = cache.next_positions(tokens.shape[1])
            positions = jnp.broadcast_to(positions, tokens.shape)
            x, cache, reduced = self._cached(x, positions, cache, statistics)
        elif self.config.scan_layers:
            x, reduced = self._scanned(x, positions, segment_ids, statistics)
        else:
            x, reduced = self._unrolled(x, positions, segment_ids, statistics)
        hidden = self.final_norm(x)
        return Output(self.head(hidden), hidden, cache, {}, reduced)

    def head(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of normalised hidden states, accumulated and returned in float32 at least."""
        # The array, not the module: a shared submodule would be two parameters in tree mode.
        table = self.embedding.embedding[...]
        return _logits("BTD,VD->BTV", hidden, table, self.config.dtype)

    def init_cache(
        self, description: Description, batch_size: int, dtype: str | None = None
    ) -> Cache:
        """An empty cache for ``batch_size`` streams through this model.

        Args:
            description: such as `sinkjax.cache.SinkWindow(...)` or `sinkjax.cache.Full(length)`.
            batch_size: B.
            dtype: of the stored keys and values; None is the dtype of the computation.
        """
        config = self.config
        layers = [
            LayerSpec(config.num_kv_heads, config.head_dim, layer.window, layer.num_sink_tokens)
            for layer in map(config.layer, range(config.num_layers))
        ]
        return create(
            description,
            layers,
            batch_size,
            dtype=dtype or config.dtype,
            context_length=config.context_length,
        )

    def layer(self, index: int) -> Block:
        """Layer ``index``, sliced out of its stack when the layers are stacked."""
        if not self.config.scan_layers:
            return self.blocks[index]
        repeat, place = divmod(index, len(self.config.windows))
        return jax.tree.map(lambda leaf: leaf[repeat], self.blocks[place])

    def _cached(self, x, positions, cache, statistics):
        states, reduced = [], []
        for index in range(self.config.num_layers):
            x, state, statistic = self.layer(index)(
                x, positions=positions, cache=cache.layer(index), statistics=statistics
            )
            states.append(state)
            reduced.append(statistic)
        return x, cache.advance(tuple(states), positions), _stack(reduced)

    def _unrolled(self, x, positions, segment_ids, statistics):
        apply = self._apply(statistics)
        reduced = []
        for block in self.blocks:
            x, statistic = apply(block, x, positions, segment_ids)
            reduced.append(statistic)
        return x, _stack(reduced)

    def _scanned(self, x, positions, segment_ids, statistics):
        apply = self._apply(statistics)

        def group(x, blocks):
            reduced = []
            for block in blocks:
                x, statistic = apply(block, x, positions, segment_ids)
                reduced.append(statistic)
            return x, _stack(reduced)

        x, reduced = jax.lax.scan(group, x, tuple(self.blocks))
        # [L / pattern, pattern, ...] is already the order of the layers.
        return x, {k: v.reshape(-1, *v.shape[2:]) for k, v in reduced.items()}

    def _apply(self, statistics):
        def apply(block, x, positions, segment_ids):
            x, _, reduced = block(
                x, positions=positions, segment_ids=segment_ids, statistics=statistics
            )
            return _keep_rows(x), reduced

        if self.config.remat == "none":
            return apply
        policies = jax.checkpoint_policies
        policy = None if self.config.remat == "full" else policies.dots_with_no_batch_dims_saveable
        # Inside a scan XLA cannot merge the two computations anyway, and the barrier costs time.
        return jax.checkpoint(apply, policy=policy, prevent_cse=not self.config.scan_layers)


def _keep_rows(x: Array) -> Array:
    """On an automatic mesh, the stream cut by rows of the batch.

    Otherwise the compiler may follow a kernel that is cut over ``data`` along the model width and
    add up partial sums of the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("data") != AxisType.Auto or x.shape[0] % mesh.shape["data"]:
        return x
    return constrain(x, PartitionSpec("data", None, None))


def _block(config: DecoderConfig, index: int, key: Array) -> Block:
    return Block(config.layer(index), config.mlp_dim, rngs=nnx.Rngs(params=key))


def _stack(reduced: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: jnp.stack([layer[name] for layer in reduced]) for name in reduced[0]}
