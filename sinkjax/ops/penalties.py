"""Auxiliary losses that keep activations without outliers and heads without collapse.

All take one layer's arrays, are means (so that a weight does not depend on the batch), and compute
in float32 at least. `sinkjax.models.Decoder` returns those in `PENALTIES` when asked.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sinkjax.ops.precision import at_least_float32
from sinkjax.sharding import ROWS, laid_out_by_compiler

ROUTER_PENALTIES = ("load_balancing", "router_z_loss")
"""Those of a mixture of experts, in `sinkjax.ops.moe`."""

PENALTIES = ("hidden_z_loss", "tweo", "decorrelation", *ROUTER_PENALTIES)
"""Names that `Decoder.__call__(penalties=...)` and the weights of a run know."""


def hidden_z_loss(
    hidden: Float[Array, "*batch D"], mask: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    r"""Squared log-sum-exp of the magnitudes of a hidden state.

    $$ \frac{1}{T} \sum_t \Big( \log \sum_i e^{|z_{t,i}|} \Big)^2 $$

    Why: the log-sum-exp is nearly the largest magnitude, so massive activations of the last layer
    shrink and the rest is hardly touched. A weight of 1e-7 is the report's.

    Args:
      hidden: `[..., D]`; the report's is the output of the last layer, which we read as the one
        before the last norm (after it no magnitude can grow).
      mask: `[...]`, tokens that count; all by default.

    Returns:
      Scalar; never below `log(D) ** 2`.

    Source: LongCat-Flash technical report, arXiv:2509.01322, equation 10.
    """
    magnitude = jnp.abs(at_least_float32(hidden))
    return _mean(jax.nn.logsumexp(magnitude, axis=-1) ** 2, mask)


def tweo(
    hidden: Float[Array, "*batch D"],
    mask: Bool[Array, "*batch"] | None = None,
    *,
    scale: float = 3.0,
    power: int = 4,
) -> Float[Array, ""]:
    r"""Mean p-th power of activations measured in units of a scale (TWEO).

    $$ E\big[ (|a| / \tau)^p \big] $$

    Why: below the scale an activation costs nearly nothing and an outlier ten times above it costs
    10,000 times as much, so extreme ones never form. The paper averages over the outputs of all
    blocks and weighs it by 0.01.

    Args:
      hidden: `[..., D]`, output of a block.
      mask: `[...]`, tokens that count; all by default.
      scale: tau. The paper's code adds 1e-6 to it, against tau = 0.
      power: p.

    Returns:
      Scalar.

    Raises:
      ValueError: `scale` or `power` is not positive.

    Source: Liang et al., "TWEO", arXiv:2511.23225.
    """
    if not scale > 0:
        raise ValueError(f"scale: expected more than 0, got {scale}")
    if power < 1:
        raise ValueError(f"power: expected at least 1, got {power}")
    ratio = jnp.abs(at_least_float32(hidden)) / scale
    return _mean(jnp.mean(ratio**power, axis=-1), mask)


def decorrelation(
    hidden: Float[Array, "*batch D"],
    anchor: Float[Array, "*batch D"],
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""Mean squared cosine between tokens and the first token of their text.

    $$ E_t\big[ \cos^2(h_t, h_{BOS}) \big] $$

    Why: tokens that point where BOS points become sinks beside it; kept apart they do not. It does
    not see lengths. The paper averages over the layers but the last.

    Args:
      hidden: `[..., D]`.
      anchor: `[..., D]`, BOS for each token. Gradients go to both.
      mask: `[...]`, tokens that count; BOS itself should not.

    Returns:
      Scalar between 0 and 1.

    Source: Cappellazzo et al., arXiv:2510.22603.
    """
    cosine = jnp.sum(_unit(hidden) * _unit(anchor), axis=-1)
    return _mean(cosine**2, mask)


def head_balance(
    open_fraction: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch"] | None = None,
    *,
    num_shared: int = 0,
) -> Float[Array, ""]:
    r"""Squared coefficient of variation of how much the heads of one layer are used.

    $$ (N - m) \, \mathrm{Var}_h(I_h) / \mathrm{Mean}_h(I_h)^2, \qquad I_h = E_t[1 - p_{sink}] $$

    Why: weight on the sink is a head that is off, so a layer is a mixture of experts over heads; a
    few that are always on starve the others. The paper sums over the layers.

    Args:
      open_fraction: `[..., N]`, one minus the weight on the sink: with sink logits
        `1 - exp(sinks - lse)`, `lse` from `dot_product_attention(..., return_residual=True)`; with
        a gate the gate.
      mask: `[...]`, tokens that count; all by default.
      num_shared: m, the most open heads, which are left alone. 0 from scratch; above it to tune a
        trained model, where the few open heads hold what it knows.

    Returns:
      Scalar, 0 when every head is open alike.

    Raises:
      ValueError: `num_shared` leaves no two heads to compare.

    Source: Fu et al., arXiv:2602.01203, as a reader's notes give its equations (the paper itself
    was not at hand); Var is over the heads, not their sample variance.
    """
    N = open_fraction.shape[-1]
    if not 0 <= num_shared <= N - 2:
        raise ValueError(f"num_shared: expected 0 to {N - 2} of {N} heads, got {num_shared}")
    wide = at_least_float32(open_fraction)
    use = jax.vmap(_mean, in_axes=(-1, None))(wide, mask)
    routed = jnp.sort(use)[: N - num_shared]
    mean = routed.mean()
    return (N - num_shared) * routed.var() / jnp.where(mean > 0, mean, 1) ** 2


# --- which tokens count


def segments(
    shape: tuple[int, ...],
    positions: Int[Array, "*#B T"] | None,
    segment_ids: Int[Array, "*#B T"] | None,
) -> Int[Array, "B T"]:
    """The segment of every token of a batch of shape (B, T), 0 for padding.

    Args:
      shape: (B, T).
      positions: −1 is padding.
      segment_ids: 0 is padding; None is one segment per row.
    """
    ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    if positions is not None:
        ids = jnp.where(positions >= 0, ids, 0)
    return jnp.broadcast_to(ids, shape)


def first_tokens(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Index in the row of the first token of each token's segment."""

    def find(segments: Array) -> Array:
        index = jnp.arange(segments.shape[1])
        begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)

    return laid_out_by_compiler(find, PartitionSpec(ROWS, "sequence"), segments)


def counted(name: str, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The tokens over which the penalty `name` is a mean."""
    real = segments != 0
    if name == "decorrelation":
        return real & (first_tokens(segments) != jnp.arange(segments.shape[1]))
    return real


def _unit(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    wide = at_least_float32(x)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # A zero vector has no direction, and its gradient must not be NaN.
    return wide * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _mean(values: Float[Array, "*batch"], mask: Bool[Array, "*batch"] | None) -> Array:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(f"mask: expected shape {values.shape}, got {mask.shape}")
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(mask.sum(), 1)
