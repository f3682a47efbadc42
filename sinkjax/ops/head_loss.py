"""Cross-entropy of hidden states whose logits are never there all at once."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from sinkjax.ops.shards import free_axes
from sinkjax.sharding import ROWS, constrain, divisible
from sinkjax_kernels.varying import as_in


@dataclasses.dataclass(frozen=True)
class _Plan:
    z_loss: float
    chunks: int
    dtype: Any  # of the products
    vocab_size: int
    axes: tuple[str, ...] = ()  # mesh axes that cut the tokens
    model: str | None = None  # mesh axis that cuts the vocabulary
    scatter: bool = False  # the gradient of the kernel over `axes`, along D


def head_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
    z_loss: float = 0.0,
    *,
    chunks: int,
    dtype: Any = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`cross_entropy(hidden @ kernel, targets, mask, z_loss)`, a chunk of the tokens at a time.

    The gradient of a chunk's logits, `mask * (softmax * (1 + 2 z_loss * lse) - onehot)`, is known
    with them, so each chunk adds its part of the gradients of `hidden` and `kernel` in the forward
    pass, that of `kernel` in float32: no logits are computed twice or kept.

    Why: at 8,192 tokens on a device and V = 128,256 the logits are 4.2 GB in float32, and their
    gradient as much again.

    On a mesh every device cuts its own tokens into chunks, against its own part of the vocabulary
    (padded where `model` does not divide it). The kernel is gathered once, in `dtype`; its gradient
    is added up over devices once, in float32.

    Args:
      hidden: `[B, T, D]`, what the head reads.
      kernel: `[D, V]`, the head; the table transposed when tied.
      targets: `[B, T]`, token ids; anything where the mask is 0.
      mask: `[B, T]`, 1 or True for tokens that count, or their weights. Not differentiated.
      z_loss: weight of the squared log-partition.
      chunks: into how many parts each device cuts its tokens; the last may be padded.
      dtype: of the products; None is that of `hidden`.

    Returns:
      `(loss, aux)` as `cross_entropy`; `aux` carries no gradient.

    Raises:
      ValueError: shapes differ, `z_loss` is negative, or `chunks` is not positive.

    Source: Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2 (gradients in the forward
      pass); Wijmans et al., "Cut Your Losses", arXiv:2411.09009 (the memory).
    """
    if chunks < 1:
        raise ValueError(f"chunks: expected at least 1, got {chunks}")
    if z_loss < 0:
        raise ValueError(f"z_loss: expected at least 0, got {z_loss}")
    if kernel.shape[0] != hidden.shape[2]:
        raise ValueError(f"kernel: expected {hidden.shape[2]} rows, got shape {kernel.shape}")
    for name, found in (("targets", targets), ("mask", mask)):
        if found is not None and found.shape != hidden.shape[:2]:
            raise ValueError(f"{name}: expected shape {hidden.shape[:2]}, got {found.shape}")
    dtype = jnp.dtype(hidden.dtype if dtype is None else dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    weight = jnp.ones(targets.shape, wide) if mask is None else mask.astype(wide)
    tokens = weight.sum()
    plan = _Plan(float(z_loss), chunks, dtype, kernel.shape[1])
    sums: Any = _sums(hidden, kernel, targets, weight, plan)
    loss, nll, penalty = (value / jnp.where(tokens > 0, tokens, 1) for value in sums)
    aux = {"nll": nll, "z_loss": penalty, "tokens": tokens}
    return loss, jax.tree.map(jax.lax.stop_gradient, aux)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden, kernel, targets, weight, plan) -> Any:
    """Weighted sums over the tokens: of the loss, and of its two terms."""
    return _on_mesh(hidden, kernel, targets, weight, plan, differentiate=False)[0]


def _forward(hidden, kernel, targets, weight, plan):
    return _on_mesh(hidden, kernel, targets, weight, plan, differentiate=True)


def _backward(plan, gradients, cotangents):
    # The terms by themselves carry no gradient.
    scale = cotangents[0]
    return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None, None


_sums.defvjp(_forward, _backward)


def _on_mesh(hidden, kernel, targets, weight, plan, differentiate) -> Any:
    """`_scan` on every device for its own tokens and its own part of the vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    free = free_axes()
    narrow = kernel.astype(plan.dtype)
    if not free:
        sums, gradients = _scan(plan, differentiate, hidden, narrow, targets, weight)
    else:
        tokens = divisible(PartitionSpec(ROWS, "sequence"), targets.shape, mesh)
        entries = (entry if isinstance(entry, tuple) else (entry,) for entry in tokens)
        axes = tuple(name for entry in entries for name in entry if name in free)
        parts = math.prod(free[name] for name in axes)
        scatter = bool(axes) and kernel.shape[0] % parts == 0
        model = "model" if "model" in free else None
        plan = dataclasses.replace(plan, axes=axes, model=model, scatter=scatter)
        stream, columns = PartitionSpec(*tokens, None), PartitionSpec(None, model)
        rest = -plan.vocab_size % free.get("model", 1)
        if rest:
            # Whole on the way: nothing leads from rows over `model` to columns over `model` directly.
            narrow = constrain(narrow, PartitionSpec(None, None))
            narrow = jnp.pad(narrow, ((0, 0), (0, rest)))
        layout = (stream, columns, tokens, tokens)
        operands = map(constrain, (hidden, narrow, targets, weight), layout)
        of_kernel = PartitionSpec(axes if scatter else None, model)
        sums, gradients = jax.shard_map(
            functools.partial(_scan, plan, differentiate),
            in_specs=layout,
            out_specs=(PartitionSpec(), (stream, of_kernel) if differentiate else None),
            axis_names=set(free),
        )(*operands)
    if not differentiate:
        return sums, None
    of_hidden, of_kernel = gradients
    if AxisType.Explicit in mesh.axis_types:  # a gradient has the layout of what it is of
        of_hidden = constrain(of_hidden, jax.typeof(hidden).sharding.spec)
        of_kernel = constrain(of_kernel, jax.typeof(kernel).sharding.spec)
    of_kernel = of_kernel[:, : plan.vocab_size]
    return sums, (of_hidden, of_kernel.astype(kernel.dtype))


def _scan(plan: _Plan, differentiate: bool, hidden, kernel, targets, weight) -> Any:
    """The sums and, on request, their gradients; the kernel may be one of several parts."""
    B, T, D = hidden.shape
    size = math.ceil(B * T / plan.chunks)
    wide = weight.dtype
    first = jax.lax.axis_index(plan.model) * kernel.shape[1] if plan.model else 0
    column = first + jnp.arange(kernel.shape[1])

    def cut(x: Array) -> Array:
        flat = x.reshape(B * T, *x.shape[2:])
        flat = jnp.pad(flat, ((0, plan.chunks * size - B * T), *((0, 0),) * (flat.ndim - 1)))
        return flat.reshape(plan.chunks, size, *flat.shape[1:])

    def over_model(x: Array, reduce: Any = jax.lax.psum) -> Array:
        return reduce(x, plan.model) if plan.model else x

    def chunk(total, part):
        x, target, weight = part
        x = x.astype(plan.dtype)
        logits = jnp.einsum("CD,DV->CV", x, kernel, preferred_element_type=wide)
        logits = jnp.where(column < plan.vocab_size, logits, -jnp.inf)
        top = over_model(logits.max(axis=-1), jax.lax.pmax)
        exponential = jnp.exp(logits - top[:, None])
        partition = over_model(exponential.sum(axis=-1))
        lse = top + jnp.log(partition)
        hit = column == target[:, None]
        nll = lse - over_model(jnp.where(hit, logits, 0).sum(axis=-1))
        # A target outside the vocabulary gives NaN, not the loss of some other token.
        nll = jnp.where((target >= 0) & (target < plan.vocab_size), nll, jnp.nan)
        # Selected before the product: a masked target may be anything.
        nll, square = (jnp.where(weight > 0, value, 0) * weight for value in (nll, lse * lse))
        penalty = plan.z_loss * square
        terms = (nll + penalty, nll, penalty)
        sums = tuple(old + term.sum() for old, term in zip(total[0], terms, strict=True))
        if not differentiate:
            return (sums, None), None
        share = weight * (1 + 2 * plan.z_loss * lse) / partition
        slope = exponential * share[:, None] - jnp.where(hit, weight[:, None], 0)
        slope = slope.astype(plan.dtype)
        of_hidden = jnp.einsum("CV,DV->CD", slope, kernel, preferred_element_type=wide)
        of_kernel = jnp.einsum("CD,CV->DV", x, slope, preferred_element_type=wide)
        return (sums, total[1] + of_kernel), of_hidden.astype(hidden.dtype)

    zeros = as_in((jnp.zeros((), wide),) * 3, weight)
    start = as_in(jnp.zeros(kernel.shape, wide), (weight, kernel)) if differentiate else None
    parts = (cut(hidden), cut(targets), cut(weight))
    totals: Any = jax.lax.scan(chunk, (zeros, start), parts)
    (sums, of_kernel), of_hidden = totals
    if plan.axes:
        sums = jax.lax.psum(sums, plan.axes)
    if not differentiate:
        return sums, None
    of_hidden = over_model(of_hidden.reshape(-1, D)[: B * T].reshape(B, T, D))
    if plan.scatter:
        of_kernel = jax.lax.psum_scatter(of_kernel, plan.axes, scatter_dimension=0, tiled=True)
    elif plan.axes:
        of_kernel = jax.lax.psum(of_kernel, plan.axes)
    return sums, (of_hidden, of_kernel)
