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
from sinkjax.modules.norm import make_norm
from sinkjax.modules.projection import contract
from sinkjax.ops import penalties as formulas
from sinkjax.ops.embedding import embed
from sinkjax.sharding import ROWS, constrain, divisible, laid_out_by_compiler
from sinkjax_kernels.flash.saved import SAVED


class Embedding(nnx.Module):
    """Token table ``embedding`` [V, D]; an id outside the vocabulary gives NaN, not a neighbour."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        shape = (config.vocab_size, config.model_dim)
        self.embedding = nnx.Param(_normal(rngs, shape, config))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embed(self.embedding[...], tokens, self.dtype)


class Head(nnx.Module):
    """Output matrix ``kernel`` [D, V] of an untied head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        shape = (config.model_dim, config.vocab_size)
        self.kernel = nnx.Param(_normal(rngs, shape, config))

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return _logits("BTD,DV->BTV", hidden, self.kernel[...], self.dtype)


class EmbeddingProjection(nnx.Module):
    """Square matrix ``kernel`` [D, D], orthogonal at the start.

    One wants it because Adam on the embedding makes outliers along the axes of the residual stream;
    behind a matrix that Muon trains, those axes are not the embedding's.

    Source: Park et al. 2025, arXiv 2506.19697 (EmbProj).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = config.dtype
        orthogonal = jax.nn.initializers.orthogonal()
        # In float32: the decomposition behind it knows no narrower type.
        wide = jnp.promote_types(config.param_dtype, jnp.float32)
        kernel = orthogonal(rngs.params(), (config.model_dim, config.model_dim), wide)
        self.kernel = nnx.Param(kernel.astype(config.param_dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return contract("BTD,DE->BTE", x.astype(self.dtype), self.kernel[...].astype(self.dtype))


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

    Parameters: ``embedding/embedding`` [V, D], ``blocks/{i}/...``, ``final_norm/...``,
    ``head/kernel`` [D, V] (absent when tied); as the config asks ``embedding_projection/kernel`` and
    ``head_projection/kernel`` [D, D]. With ``scan_layers`` the list ``blocks`` runs over
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
        self.final_norm = make_norm(config.model_dim, config, rngs)
        if not config.tied_head:
            # Shadows the method: `model.head(hidden)` either way, and the matrix is head/kernel.
            self.head = Head(config, rngs=rngs)  # pyright: ignore[reportAttributeAccessIssue]
        if config.embedding_projection:
            # Drawn last, so that the other parameters of a seed stay what they are without it.
            self.embedding_projection = EmbeddingProjection(config, rngs=rngs)
            self.head_projection = EmbeddingProjection(config, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[Array, " T"] | None = None,
        cache: Cache | None = None,
        statistics: bool = False,
        penalties: tuple[str, ...] = (),
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] ids.
            positions: [B, T] or [T] in tokens, −1 is padding. None: the index in the row, with
                segments that in the segment, or with a cache the next ones of its clock. None is
                also the fastest: kernels know it while tracing.
            segment_ids: [B, T] or [T]; segments of one row do not see each other.
            cache: tokens seen before, from `init_cache`; the result holds the one that follows.
            statistics: also reduce per-layer attention and residual statistics (`Attention`,
                `Block`); with a cache none of attention.
            penalties: names of `sinkjax.ops.penalties.PENALTIES` to return in ``aux``, unweighted,
                over the tokens that are no padding: ``tweo`` is a mean over the layers,
                ``decorrelation`` (from the first token of the segment) over the layers but the
                last, ``hidden_z_loss`` of the last layer before the norm, ``load_balancing`` and
                ``router_z_loss`` means over the layers of a mixture of experts. Not with a cache.

        Returns:
            `Output`; statistics have a leading layer axis in the order of the layers.

        Raises:
            ValueError: a cache together with segment_ids or penalties, or an unknown penalty.
        """
        _check_penalties(penalties, self.config, cached=cache is not None)
        x = _keep_rows(self.embed(tokens))
        measured = None
        if penalties:
            measured = penalties, formulas.segments(tokens.shape, positions, segment_ids)
        aux = {}
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
            x, (reduced, aux) = self._scanned(x, positions, segment_ids, statistics, measured)
        else:
            x, (reduced, aux) = self._unrolled(x, positions, segment_ids, statistics, measured)
        if measured:
            aux = _over_layers(*measured, aux, x)
        hidden = self.final_norm(x)
        if self.config.embedding_projection:
            hidden = self.head_projection(hidden)
        return Output(self.head(hidden), hidden, cache, aux, reduced)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first block reads: the embeddings, projected where the config asks for it."""
        x = self.embedding(tokens)
        return self.embedding_projection(x) if self.config.embedding_projection else x

    def head(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of `Output.hidden`, accumulated and returned in float32 at least.

        With an embedding projection `Output.hidden` is already behind it.
        """
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
            LayerSpec(
                config.num_kv_heads,
                config.head_dim,
                layer.window,
                layer.num_sink_tokens,
                config.num_heads if config.forget_gate else 0,
                config.num_heads,
            )
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

    def _unrolled(self, x, positions, segment_ids, statistics, measured):
        apply = self._apply(statistics, measured)
        reduced = []
        for block in self.blocks:
            x, found = apply(block, x, positions, segment_ids)
            reduced.append(found)
        return x, _stack(reduced)

    def _scanned(self, x, positions, segment_ids, statistics, measured):
        apply = self._apply(statistics, measured)

        def group(x, blocks):
            reduced = []
            for block in blocks:
                x, found = apply(block, x, positions, segment_ids)
                reduced.append(found)
            return x, _stack(reduced)

        x, reduced = jax.lax.scan(group, x, tuple(self.blocks))
        # [L / pattern, pattern, ...] is already the order of the layers.
        return x, jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), reduced)

    def _apply(self, statistics, measured):
        routers = [n for n in formulas.ROUTER_PENALTIES if measured and n in measured[0]]

        def apply(block, x, positions, segment_ids):
            x, _, reduced = block(
                x,
                positions=positions,
                segment_ids=segment_ids,
                statistics=statistics,
                penalties=tuple(routers),
            )
            x = _keep_rows(x)
            found = _of_layer(measured[0], measured[1], x) if measured else {}
            return x, (reduced, found | {name: reduced.pop(name) for name in routers})

        if self.config.remat == "none":
            return apply
        policies = jax.checkpoint_policies
        policy = {
            "full": None,
            "dots": policies.dots_with_no_batch_dims_saveable,
            "attention": policies.save_only_these_names(SAVED),
        }[self.config.remat]
        # Inside a scan XLA cannot merge the two computations anyway, and the barrier costs time.
        return jax.checkpoint(apply, policy=policy, prevent_cse=not self.config.scan_layers)


def _keep_rows(x: Array) -> Array:
    """On an automatic mesh, the stream cut by rows of the batch and, over ``sequence``, by tokens.

    Otherwise the compiler may follow a kernel that is cut over ``data`` along the model width and
    add up partial sums of the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("data") != AxisType.Auto:
        return x
    return constrain(x, divisible(PartitionSpec(ROWS, "sequence", None), x.shape, mesh))


def _block(config: DecoderConfig, index: int, key: Array) -> Block:
    return Block(config.layer(index), config.mlp_dim, rngs=nnx.Rngs(params=key), mlp=config.mlp)


def _stack(reduced):
    return jax.tree.map(lambda *layers: jnp.stack(layers), *reduced)


def _check_penalties(names: tuple[str, ...], config: DecoderConfig, cached: bool) -> None:
    unknown = [name for name in names if name not in formulas.PENALTIES]
    if unknown:
        expected = ", ".join(formulas.PENALTIES)
        raise ValueError(f"penalties: expected some of {expected}; got {', '.join(unknown)}")
    if names and cached:
        raise ValueError(f"penalties: expected none with a cache, got {', '.join(names)}")
    if "decorrelation" in names and config.num_layers < 2:
        raise ValueError(
            "penalties: expected at least 2 layers with decorrelation, which leaves out the last; "
            f"got {config.num_layers}"
        )
    routers = [name for name in names if name in formulas.ROUTER_PENALTIES]
    if routers and not config.num_experts:
        raise ValueError(f"penalties: expected experts with {', '.join(routers)}, got none")


def _of_layer(
    names: tuple[str, ...], segments: Int[Array, "B T"], x: Float[Array, "B T D"]
) -> dict[str, Array]:
    """The penalties of one block's output."""
    found = {}
    if "tweo" in names:
        found["tweo"] = formulas.tweo(x, formulas.counted("tweo", segments))
    if "decorrelation" in names:
        first = formulas.first_tokens(segments)[..., None]
        anchor = laid_out_by_compiler(
            lambda x, first: jnp.take_along_axis(x, first, axis=1),
            PartitionSpec(ROWS, "sequence"),
            x,
            first,
        )
        mask = formulas.counted("decorrelation", segments)
        found["decorrelation"] = formulas.decorrelation(x, anchor, mask)
    return found


def _over_layers(
    names: tuple[str, ...],
    segments: Int[Array, "B T"],
    layers: dict[str, Array],
    x: Float[Array, "B T D"],
) -> dict[str, Array]:
    """The penalties of the model from those of its layers and the last layer's output."""
    found = {name: value.mean() for name, value in layers.items()}
    if "decorrelation" in layers:
        found["decorrelation"] = layers["decorrelation"][:-1].mean()
    if "hidden_z_loss" in names:
        mask = formulas.counted("hidden_z_loss", segments)
        found["hidden_z_loss"] = formulas.hidden_z_loss(x, mask)
    return found
