r"""All keys before a query: they travel round the ring of shards, and partial results are merged.

$$\mathrm{lse} = \log \sum_b e^{\mathrm{lse}_b},\quad o = \sum_b e^{\mathrm{lse}_b - \mathrm{lse}} o_b$$

A sink logit s belongs to a row, not to a block: it is added once, after the merge, as
$o\,\sigma(\mathrm{lse} - s)$ and $\mathrm{lse}' = \log(e^{\mathrm{lse}} + e^s)$.

Causal rows are cut into 2n chunks, and shard i computes the queries of chunks i and 2n − 1 − i, so that
all have as much to do: whichever shard's keys are there, two squares of a chunk each are to be computed.
The backward pass goes round once more, each block computed anew from its keys and the final log-sum-exp;
gradients of keys travel with them. A shard never holds more than two shards' keys.

Source: Liu et al. 2023, arXiv 2310.01889 (ring attention); Brandon et al. 2023, arXiv 2311.09431
(balanced chunks; here as in zig-zag schedules); the merge, Dao 2023, arXiv 2307.08691.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sinkjax.ops.sequence.keys import keys_of, operands_of
from sinkjax.ops.sequence.rectangle import merge
from sinkjax.ops.sequence.shift import AXIS, shards, shift
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash.saved import saved
from sinkjax_kernels.normalizers import Softmax
from sinkjax_kernels.varying import alike


def ring(attend, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    """`attend(arrays, static)` of whole rows, for causal or full masks of packed rows or not."""
    visibility, normalizer = arrays["visibility"], static["normalizer"]
    B, T, N, _ = arrays["query"].shape
    sinks = arrays["sinks"]
    constant = normalizers.constant_sink(normalizer)
    if constant is not None:
        normalizer, sinks = Softmax(), jnp.full((N,), constant, jnp.float32)
    elif isinstance(normalizer, normalizers.SoftmaxN):
        normalizer = Softmax()
    segments = visibility.query_segment_ids
    if segments is not None:
        segments = jnp.broadcast_to(segments, (B, T))
    operands = arrays["query"], keys_of(arrays), segments
    if visibility.is_causal:
        operands = _deal(operands)
    blocks = _Blocks(attend, static | {"normalizer": normalizer}, visibility.is_causal, shards())
    results: Any = _around(blocks, *alike(operands))
    out, lse = _collect(results) if visibility.is_causal else results
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)


def add_sinks(out, lse, sinks) -> tuple[Array, Array]:
    """Attention with sink logits `[N]` or `[B, T, N]` from that without: the identity above."""
    sinks = sinks.astype(lse.dtype)
    kept = jax.nn.sigmoid(lse - sinks)[..., None]
    return (kept * out.astype(lse.dtype)).astype(out.dtype), jnp.logaddexp(lse, sinks)


def _holder(chunk: int, n: int) -> int:
    """Which shard computes the queries of a chunk."""
    return min(chunk, 2 * n - 1 - chunk)


def _deal(tree: Any) -> Any:
    """From shard d's tokens, chunks 2d and 2d + 1, to chunks d and 2n − 1 − d."""
    n, even = shards(), jax.lax.axis_index(AXIS) % 2 == 0

    def one(x):
        halves = jnp.split(x, 2, axis=1)
        a, b = (
            jax.lax.ppermute(half, AXIS, [(d, _holder(2 * d + odd, n)) for d in range(n)])
            for odd, half in enumerate(halves)
        )  # the even chunk of the two that this shard computes, and the odd one
        return jnp.concatenate([jnp.where(even, a, b), jnp.where(even, b, a)], axis=1)

    return jax.tree.map(one, tree)


def _collect(tree: Any) -> Any:
    """The inverse of `_deal`."""
    n, even = shards(), jax.lax.axis_index(AXIS) % 2 == 0

    def one(x):
        low, high = jnp.split(x, 2, axis=1)
        halves = jnp.where(even, low, high), jnp.where(even, high, low)
        back = (
            jax.lax.ppermute(half, AXIS, [(_holder(2 * d + odd, n), d) for d in range(n)])
            for odd, half in enumerate(halves)
        )
        return jnp.concatenate([*back], axis=1)

    return jax.tree.map(one, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """What a shard computes when the keys of the one `step` to its left are there; step 0 are its own.

    Args:
        attend: an attention function of operands and static options.
        static: those options.
        is_causal: chunks lie as `_deal` leaves them.
        shards: n.
    """

    attend: Callable[..., Any]
    static: dict[str, Any]
    is_causal: bool
    shards: int

    def _is_left(self, step):
        """Whether the keys that are there are of a shard with a lower number."""
        return jax.lax.axis_index(AXIS) >= step

    def rows(self, step, x):
        """Of something `[B, T, ...]`, the part of the queries of each block, blocks one after another."""
        if not self.is_causal or step is None:
            return x
        low, high = jnp.split(x, 2, axis=1)
        return jnp.concatenate([jnp.where(self._is_left(step), low, high), high])

    def keys(self, step, x):
        """The same of keys: the first chunk of any shard is before our second, the second only of later."""
        if not self.is_causal or step is None:
            return x
        first, second = jnp.split(x, 2, axis=1)
        return jnp.concatenate([first, jnp.where(self._is_left(step), first, second)])

    def add(self, step, state, out, lse) -> tuple[Array, Array]:
        """Merge the rows of blocks into the state, output and log-sum-exp of all rows."""
        if not self.is_causal or step is None:
            return merge(state[0], state[1], out, lse)
        is_left = self._is_left(step)
        (low_out, high_out), (low_lse, high_lse) = (jnp.split(x, 2, axis=1) for x in state)
        (out, more_out), (lse, more_lse) = (jnp.split(x, 2) for x in (out, lse))
        low, high = (low_out, low_lse), merge(high_out, high_lse, more_out, more_lse)
        old_out, old_lse = _where(is_left, low, high)
        new = merge(old_out, old_lse, out, lse)
        low, high = _where(is_left, new, low), _where(is_left, high, new)
        out, lse = (jnp.concatenate(halves, axis=1) for halves in zip(low, high, strict=True))
        return out, lse

    def run(self, step, query, keys, segments, key_segments) -> tuple[Array, Array]:
        """Output and log-sum-exp of the rows of the blocks; `step` None is the shard's own keys."""
        query, segments = jax.tree.map(partial(self.rows, step), (query, segments))
        keys, key_segments = jax.tree.map(partial(self.keys, step), (keys, key_segments))
        if step is None:
            # The shard's chunks follow one another, if not at once: as one row they are causal.
            key_segments = segments
        (B, T, _, _), K = query.shape, keys["key"].shape[2]
        call = operands_of(keys) | {
            "query": query,
            "sinks": None,
            "visibility": masks.build(
                (B, T, T, K),
                is_causal=self.is_causal and step is None,
                query_segment_ids=segments,
                key_segment_ids=key_segments,
            ),
        }
        return self.attend(call, self.static)


def _where(condition, a, b) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _travel(n: int, moving, carry, visit):
    """`visit(step, moving, carry)` for the keys of every other shard, the next ones under way meanwhile."""
    moving = shift(moving, wrap=True)
    if n == 2:
        return visit(jnp.int32(1), moving, carry)

    def turn(state, step):
        moving, carry = state
        # The last ones are for nothing: one body is compiled in half the time of two.
        following = shift(moving, wrap=True)
        return (following, visit(step, moving, carry)), None

    (_, carry), _ = jax.lax.scan(turn, (moving, carry), jnp.arange(1, n))
    return carry


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(blocks: _Blocks, query, keys, segments) -> Any:
    """Output in the dtype of the query, and log-sum-exp, without sinks."""
    out, lse = blocks.run(None, query, keys, segments, segments)
    state = out.astype(lse.dtype), lse

    def visit(step, moving, state):
        out, lse = blocks.run(step, query, moving[0], segments, moving[1])
        return blocks.add(step, state, out.astype(lse.dtype), lse)

    out, lse = _travel(blocks.shards, (keys, segments), state, visit)
    return out.astype(query.dtype), lse


def _forward_rule(blocks, query, keys, segments):
    results: Any = saved(_around(blocks, query, keys, segments))
    return results, (query, keys, segments, *results)


def _backward_rule(blocks, residuals, cotangents):
    query, keys, segments, out, lse = residuals
    d_out, d_lse = cotangents
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1) - d_lse  # D − dL

    def gradients(step, keys, key_segments):
        """dq and those of keys, by way of the blocks of one step."""

        def run(query, keys):
            return blocks.run(step, query, keys, segments, key_segments)

        (part, part_lse), pull = jax.vjp(run, query, keys)
        total, d_part, rest = jax.tree.map(partial(blocks.rows, step), (lse, d_out, delta))
        # With the weight of the block in the row, do_b = w dO and dlse_b = w (dO · o_b − D + dL).
        # A row that sees nothing has no weight, and no log-sum-exp to take away.
        weight = jnp.exp(part_lse - jnp.where(total == -jnp.inf, 0, total))
        within = (d_part.astype(lse.dtype) * part.astype(lse.dtype)).sum(-1)
        d_part = (weight[..., None] * d_part.astype(lse.dtype)).astype(part.dtype)
        found = pull((d_part, weight * (within - rest)))
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, lse.dtype)), found)

    def visit(step, moving, carry):
        dq, travelling = carry
        travelling = shift(travelling, wrap=True)  # to where their keys are
        more, found = gradients(step, *moving)
        return dq + more, jax.tree.map(jnp.add, travelling, found)

    carry = gradients(None, keys, segments)
    dq, dk = _travel(blocks.shards, (keys, segments), carry, visit)
    dk = shift(dk, wrap=True)
    dq, dk = jax.tree.map(lambda x, like: x.astype(like.dtype), (dq, dk), (query, keys))
    return dq, dk, None


_around.defvjp(_forward_rule, _backward_rule)
