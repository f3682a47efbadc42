r"""Sinks for an attention kernel that knows of none, from its output and log-sum-exp alone; exact.

With s the sink logit, $O' = \sigma(L - s)\, O$ and $L' = \ln(e^L + e^s)$ are attention with a sink.
A backward pass that is given (O', L') in the place of (O, L) computes the gradients with the sink: it
makes the weights anew as $e^{X - L'}$ and $D' = \sum dO \cdot O'$, and nothing else depends on the
sink; its own is $ds = -\sum_t e^{s - L'_t} (D'_t - dL_t)$.

No O' injects the cotangent dL of the log-sum-exp ($D' - dL$ is wanted where dO may be 0), so that part
is added: $P\,\mathrm{diag}(dL)$ needs $\sum_j P_{tj} k_j$, attention with the keys as values, and
$\sum_t P_{tj} dL_t q_t$, the gradient by the values where the cotangent is dL q. One more call forward
and one backward, and none where nobody differentiates the log-sum-exp.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from sinkjax_kernels.flash.saved import saved


@runtime_checkable
class Kernel(Protocol):
    """Softmax attention without sinks, forward and backward; hashable. No row may see nothing."""

    @property
    def scale(self) -> float: ...

    def forward(self, query, key, value) -> tuple[Array, Array]:
        """The output [B, T, N, H] and its log-sum-exp [B, N, T]."""
        ...

    def backward(self, query, key, value, out, lse, d_out) -> tuple[Array, Array, Array]:
        """Gradients by query, key and value; weights come from `lse`, and D from `out`."""
        ...


def attend(
    kernel: Kernel,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    sinks: Float[Array, " N"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Attention by `kernel` with a sink logit per head; both results are differentiable."""
    results: Any = _attend(kernel, query, key, value, sinks)
    return results


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, query, key, value, sinks):
    out, lse = kernel.forward(query, key, value)
    if sinks is None:
        return out, lse
    at = sinks.astype(lse.dtype)[:, None]  # [N, 1]
    share = jax.nn.sigmoid(lse - at).swapaxes(1, 2)  # of the keys: [B, T, N]
    return (out * share[..., None]).astype(out.dtype), jnp.logaddexp(lse, at)


def _forward_rule(kernel, query, key, value, sinks):
    query, key, value, sinks = jax.tree.map(
        lambda x: x.value, (query, key, value, sinks), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    results: Any = saved(_attend(kernel, query, key, value, sinks))
    return results, (query, key, value, sinks, *results)


def _backward_rule(kernel, residuals, cotangents):
    query, key, value, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    d_query, d_key, d_value = kernel.backward(query, key, value, out, lse, d_out)
    wide = [x.astype(lse.dtype) for x in (d_out, out)]
    delta = (wide[0] * wide[1]).sum(-1).swapaxes(1, 2)  # D', [B, N, T]
    if not isinstance(d_lse, SymbolicZero):
        delta = delta - d_lse
        more = _by_log_sum_exp(kernel, residuals, d_lse)
        d_query, d_key = (
            (x.astype(lse.dtype) + y).astype(x.dtype)
            for x, y in zip((d_query, d_key), more, strict=True)
        )
    if sinks is None:
        return d_query, d_key, d_value, None
    share = jnp.exp(sinks.astype(lse.dtype)[:, None] - lse)  # of the sink, at most 1
    return d_query, d_key, d_value, -(share * delta).sum((0, 2)).astype(sinks.dtype)


_attend.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _by_log_sum_exp(kernel, residuals, d_lse) -> tuple[Array, Array]:
    """What the cotangent of the log-sum-exp adds to the gradients by query and key."""
    query, key, value, _, out, lse = residuals
    mean_key, without = kernel.forward(query, key, key)
    by_query = (d_lse * jnp.exp(without - lse)).swapaxes(1, 2)[..., None]
    by_key = d_lse.swapaxes(1, 2)[..., None] * query.astype(lse.dtype)
    _, _, d_key = kernel.backward(query, key, value, out, lse, by_key.astype(query.dtype))
    return tuple(kernel.scale * x for x in (by_query * mean_key, d_key.astype(lse.dtype)))
