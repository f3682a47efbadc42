"""Mixture of experts: who gets a token, what it costs to be uneven, and the experts themselves."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops.activations import swiglu
from sinkjax.ops.precision import at_least_float32
from sinkjax.ops.ragged import ragged_linear
from sinkjax.sharding import ROWS, constrain
from sinkjax_kernels.varying import as_in

Activation = Callable[[Array, Array], Array]


def route(
    logits: Float[Array, "*batch E"], k: int
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    r"""The k experts of each token and their weights.

    $$ w = \mathrm{softmax}(z_{e_1}, \dots, z_{e_k}) = p_{e_j} / \sum_j p_{e_j},
       \qquad p = \mathrm{softmax}(z) $$

    Why: the softmax of the chosen logits (gpt-oss) and the softmax over all experts, of which the
    chosen are made to sum to 1 (Mixtral), are the same numbers: the sum over all cancels.

    Args:
      logits: `[..., E]`, of the router.
      k: experts per token. Among equal logits the lower index wins.

    Returns:
      Weights `[..., k]`, float32 at least, largest first, and expert indices `[..., k]`.

    Raises:
      ValueError: there are fewer than k experts.

    Source: Jiang et al., "Mixtral of Experts", arXiv:2401.04088, section 2.1; gpt-oss model card,
      arXiv:2508.10925.

    Example:
      >>> weights, experts = route(jnp.array([[0.0, 3.0, 1.0, 3.0]]), 2)
      >>> weights.tolist(), experts.tolist()
      ([[0.5, 0.5]], [[1, 3]])
    """
    E = logits.shape[-1]
    if not 1 <= k <= E:
        raise ValueError(f"k: expected 1 to {E} of {E} experts, got {k}")
    logits = at_least_float32(logits)
    experts = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
    # Read with a mask: the gradient of a gather is a scatter, which meshes and TPUs are bad at.
    mask = experts[..., None] == jnp.arange(E)
    return jax.nn.softmax(jnp.where(mask, logits[..., None, :], 0).sum(-1), axis=-1), experts


def expert_counts(experts: Int[Array, "*batch k"], num_experts: int) -> Float[Array, "*batch E"]:
    """How often each token chose each expert, 0 or 1.

    Args:
      experts: `[..., k]` from `route`.
      num_experts: E.
    """
    return (experts[..., None] == jnp.arange(num_experts)).sum(-2).astype(jnp.float32)


def load_balancing_loss(
    logits: Float[Array, "*batch E"],
    experts: Int[Array, "*batch k"],
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""How unevenly the experts of one layer are used.

    $$ E \sum_e f_e P_e, \qquad f_e = \frac{1}{k\,T} \sum_t [e \in \text{chosen}_t],
       \qquad P_e = \frac{1}{T} \sum_t \mathrm{softmax}(z_t)_e $$

    Why: experts that get no tokens learn nothing and get fewer. The gradient goes through P alone.
    It is 1 for even use whatever k, and E when all goes to one expert with k = 1; the loss of
    Mixtral's code leaves out the 1/k of f, so its 0.001 is 0.002 here. Switch weighs it by 0.01.

    Args:
      logits: `[..., E]`, of the router.
      experts: `[..., k]`, which were chosen.
      mask: `[...]`, tokens that count; all by default.

    Returns:
      Scalar.

    Source: Fedus et al., "Switch Transformers", arXiv:2101.03961, equations 4 to 6, for k = 1.
    """
    E, k = logits.shape[-1], experts.shape[-1]
    probabilities = jax.nn.softmax(at_least_float32(logits), axis=-1)
    use = expert_counts(experts, E) / k
    return E * jnp.sum(_mean(use, mask) * _mean(probabilities, mask))


def router_z_loss(
    logits: Float[Array, "*batch E"], mask: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    r"""Squared log-sum-exp of the router's logits.

    $$ \frac{1}{T} \sum_t \Big( \log \sum_e e^{z_{t,e}} \Big)^2 $$

    Why: small logits round well in low precision. The paper weighs it by 0.001.

    Args:
      logits: `[..., E]`.
      mask: `[...]`, tokens that count; all by default.

    Returns:
      Scalar.

    Source: Zoph et al., "ST-MoE", arXiv:2202.08906, equation 5.
    """
    square = jax.nn.logsumexp(at_least_float32(logits), axis=-1) ** 2
    return _mean(square[..., None], mask)[0]


def _mean(values: Array, mask: Array | None) -> Array:
    """[..., E] -> [E], over the tokens that count."""
    axes = tuple(range(values.ndim - 1))
    if mask is None:
        return values.mean(axes)
    total = jnp.where(mask[..., None], values, 0).sum(axes)
    return total / jnp.maximum(mask.sum(), 1)


def mixture(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    kernels: Mapping[str, Float[Array, "..."]],
    activation: Activation = swiglu,
) -> Float[Array, "B T D"]:
    r"""Each token through the experts that it chose; none is dropped.

    $$ y_t = \sum_j w_{t,j} \, \big( a(x_t W^{gate}_e, x_t W^{up}_e) \big) W^{down}_e,
       \qquad e = e_{t,j} $$

    Why: the pairs of token and expert are sorted by expert, so that each expert is one product over
    the run of its tokens, however many: no capacity, nothing dropped, shapes that do not depend on
    the choice.

    On a mesh with the axis `expert` each device keeps E over `expert` experts. It takes the tokens of
    all devices along that axis, computes for those that chose its own experts, and the results are
    summed back. Rows of the batch are cut over `ROWS`, tokens over `sequence`, F over `model`;
    kernels that are cut along D too are gathered over `data` and `sequence` just before use, and
    never over `expert`. What does not divide stays whole. The k rows of every token of the group
    have their place on each of its devices, since all might be its own; only those that are cost
    arithmetic on TPU.

    Args:
      x: `[B, T, D]`.
      weights: `[B, T, k]` from `route`.
      experts: `[B, T, k]` from `route`.
      kernels: `gate` and `up` `[E, D, F]`, `down` `[E, F, D]`; if there are biases, `gate_bias` and
        `up_bias` `[E, F]`, `down_bias` `[E, D]`. Taken in the dtype of `x`.
      activation: of gate and up, both `[..., F]`.

    Returns:
      `[B, T, D]`, in the dtype of `x`.

    Source: Gale et al., "MegaBlocks", arXiv:2211.15841 (dropless); Lepikhin et al., "GShard",
      arXiv:2006.16668 (experts over devices).
    """
    kernels = {name: kernel.astype(x.dtype) for name, kernel in kernels.items()}
    mesh = jax.sharding.get_abstract_mesh()
    free = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if not free:
        return _local(x, weights, experts, kernels, activation, {}, False)

    def cut(size: int, *names: str) -> tuple[str, ...]:
        present = tuple(name for name in names if name in free)
        return present if size % math.prod(free[name] for name in present) == 0 else ()

    B, T, _ = x.shape
    E, D, F = kernels["gate"].shape
    rows, columns = cut(B, *ROWS), cut(T, "sequence")
    # A kernel is gathered here over what cuts the tokens; over other axes before it comes here.
    gathered = (name for name in ("data", "sequence") if name in rows + columns)
    axes = {"E": cut(E, "expert"), "D": cut(D, *gathered), "F": cut(F, "model")}
    letters = {name: _LETTERS[name] for name in kernels}
    tokens = _spec(rows, columns, ())
    specs = {name: _spec(*(axes[n] for n in word)) for name, word in letters.items()}
    placed = {name: constrain(kernel, specs[name]) for name, kernel in kernels.items()}

    def run(x, weights, experts, kernels):
        if axes["D"]:
            kernels = {
                name: jax.lax.all_gather(w, axes["D"], axis=letters[name].index("D"), tiled=True)
                if "D" in letters[name]
                else w
                for name, w in kernels.items()
            }
        return _local(x, weights, experts, kernels, activation, axes, "expert" in rows)

    return jax.shard_map(
        run, in_specs=(tokens,) * 3 + (specs,), out_specs=tokens, axis_names=set(free)
    )(constrain(x, tokens), constrain(weights, tokens), constrain(experts, tokens), placed)


_LETTERS = {
    "gate": "EDF",
    "up": "EDF",
    "down": "EFD",
    "gate_bias": "EF",
    "up_bias": "EF",
    "down_bias": "ED",
}


def _spec(*axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))


def _local(x, weights, experts, kernels, activation, axes, rows_cut):
    """`mixture` of one device's experts and all of its `expert` group's tokens."""
    shape, groups = x.shape, axes.get("E")
    tokens = [a.reshape(-1, a.shape[-1]) for a in (x, weights, experts)]
    if groups and rows_cut:
        tokens = [jax.lax.all_gather(a, groups, tiled=True) for a in tokens]
    x, weights, experts = tokens
    E = kernels["gate"].shape[0]
    if groups:
        experts = experts - jax.lax.axis_index(groups) * E
    if axes.get("F") and "down_bias" in kernels:
        # Partial sums over F are added up: the bias comes in once.
        first = jax.lax.axis_index(axes["F"]) == 0
        kernels = kernels | {"down_bias": jnp.where(first, kernels["down_bias"], 0)}
    out = expert_sum(x, weights, experts, kernels, activation)
    if groups and rows_cut:
        out = jax.lax.psum_scatter(out, groups, tiled=True)
    elif groups:
        out = jax.lax.psum(out, groups)
    if axes.get("F"):
        out = jax.lax.psum(out, axes["F"])
    return out.reshape(shape)


def expert_sum(
    x: Float[Array, "M D"],
    weights: Float[Array, "M k"],
    experts: Int[Array, "M k"],
    kernels: Mapping[str, Float[Array, "..."]],
    activation: Activation = swiglu,
) -> Float[Array, "M D"]:
    """`mixture` without a mesh, for tokens in a row: an index outside of the experts adds nothing."""
    E, k = kernels["gate"].shape[0], experts.shape[-1]
    flat = experts.reshape(-1)
    own = (flat >= 0) & (flat < E)
    order, back, sizes = _sort(jnp.where(own, flat, E), E)  # those of other devices come last
    own = own.reshape(-1, k, 1)
    # As the kernels vary, so that the gradients below are those of one device's own rows.
    x, weights = as_in((x, weights), (experts, kernels))
    rows = _spread(x, order, back, own)
    gate, up = (
        ragged_linear(rows, kernels[name], sizes, kernels.get(f"{name}_bias"))
        for name in ("gate", "up")
    )
    inside = activation(gate, up)
    found = ragged_linear(inside, kernels["down"], sizes, kernels.get("down_bias"))
    wide = weights[..., None] * at_least_float32(_collect(found, order, back, own))
    return wide.sum(axis=1).astype(x.dtype)


def _sort(key: Int[Array, " M"], E: int) -> tuple[Array, Array, Array]:
    """Pairs by expert: what pair is in each place, the place of each pair below E, pairs per expert.

    A sort of one array and a running count: a stable argsort and its inverse, two sorts of two
    arrays, take the TPU compiler four times as long.
    """
    M = key.shape[0]
    if (E + 1) * M < 2**31:
        index = jnp.arange(M, dtype=jnp.int32)
        order = jax.lax.sort(key.astype(jnp.int32) * M + index, is_stable=False) % M
    else:
        order = jnp.argsort(key, stable=True)
    chosen = key == jnp.arange(E)[:, None]
    count = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
    sizes = count[:, -1]
    start = jnp.cumsum(sizes) - sizes
    return order, jnp.where(chosen, count - 1 + start[:, None], 0).sum(axis=0), sizes


# Both ways a permutation is a gather; autodiff would turn one of them into a scatter. Rows of no run
# hold anything at all, so they are replaced and not multiplied by 0.


@jax.custom_vjp
def _spread(x, order, back, own):
    """[M, D] -> [M k, D]: the token of each pair, sorted."""
    return x[order // own.shape[1]]


def _spread_backward(kept, g):
    order, back, own = kept
    each = jnp.where(own, g[back].reshape(*own.shape[:2], -1), 0)
    return at_least_float32(each).sum(axis=1).astype(g.dtype), None, None, None


_spread.defvjp(lambda x, *index: (_spread(x, *index), index), _spread_backward)


@jax.custom_vjp
def _collect(y, order, back, own):
    """[M k, D] -> [M, k, D]: each pair back to its token, 0 for those of other devices."""
    return jnp.where(own, y[back].reshape(*own.shape[:2], -1), 0)


def _collect_backward(kept, g):
    order, _, own = kept
    return jnp.where(own, g, 0).reshape(-1, g.shape[-1])[order], None, None, None


_collect.defvjp(lambda y, *index: (_collect(y, *index), index), _collect_backward)
