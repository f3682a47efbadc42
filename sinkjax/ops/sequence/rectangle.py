"""Blocks in which every query sees every key, by kernels that are built for causal masks only.

A square of c queries and c keys is two triangles: key j ≤ query t, which is causal attention; and j > t,
which is that of the tokens in reverse, queries one place further: of query c − 2 − t and key c − 1 − j.
Together they have the pairs of the square, and none twice. They are two rows of one call, and their
parts of a row of logits are merged by log-sum-exp.

In packed rows most squares are of one document that is longer than a chunk, or empty. The former go that
way; others need a mask within the square, and `flash.xla` serves them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.ops.dispatch import Implementation, Table
from sinkjax_kernels import masks


def rectangular(table: Table) -> Table:
    """The same implementations, of which those that refuse a mask that is full compute it as triangles."""

    def wrapped(known: Implementation) -> Implementation:
        run, check = partial(_run, known, table["xla"]), partial(_check, known)
        return Implementation(run, check, known.platform)

    return {name: x if x.platform is None else wrapped(x) for name, x in table.items()}


def merge(
    out: Float[Array, "B T N h"],
    lse: Float[Array, "B T N"],
    other: Float[Array, "B T N h"],
    other_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N h"], Float[Array, "B T N"]]:
    """Attention over two sets of keys from that over each; in the precision of `lse`."""
    total = jnp.logaddexp(lse, other_lse)
    top = jnp.where(total == -jnp.inf, 0, total)  # of a row that sees nothing in either
    mine, theirs = (jnp.exp(x - top)[..., None] for x in (lse, other_lse))
    return mine * out + theirs * other, total


def _run(known: Implementation, other: Implementation, **call) -> Any:
    visibility = call["visibility"]
    if visibility.is_causal or _allows(known, call):
        return known.run(**call)
    if visibility.query_segment_ids is None:
        return _triangles(known, call)
    document = visibility.query_segment_ids[:, :1]
    is_one = [
        (x == document).all() for x in (visibility.query_segment_ids, visibility.key_segment_ids)
    ]
    return jax.lax.cond(
        is_one[0] & is_one[1], lambda: _triangles(known, call), lambda: other.run(**call)
    )


def _check(known: Implementation, **call) -> None:
    if call["visibility"].is_causal:
        _refuse(known, call)
    elif not _allows(known, call):
        if call["bias"] is not None:
            raise NotImplementedError(
                "bias: squares with one are not built as triangles; `flash.xla` serves them"
            )
        _refuse(known, call | {"visibility": _causal(call["query"], call["key"])})


def _refuse(known: Implementation, call) -> None:
    if known.check is not None:
        known.check(**call)


def _allows(known: Implementation, call) -> bool:
    try:
        _refuse(known, call)
    except NotImplementedError:
        return False
    return True


def _causal(query, key) -> masks.Visibility:
    (B, T, _, _), (_, S, K, _) = query.shape, key.shape
    return masks.build((B, T, S, K), is_causal=True)


def _folded(call) -> dict[str, Any]:
    """The causal call of both triangles; `[2B, c, ...]`, the lower ones first."""
    backwards = {
        "query": jnp.roll(
            call["query"][:, ::-1], -1, axis=1
        ),  # the last one ends there, for nothing
        "key": call["key"][:, ::-1],
        "value": call["value"][:, ::-1],
    }
    both = {name: jnp.concatenate([call[name], x]) for name, x in backwards.items()}
    return call | both | {"visibility": _causal(both["query"], both["key"])}


def _triangles(known: Implementation, call) -> Any:
    out, lse = (jnp.split(x, 2) for x in known.run(**_folded(call)))
    upper, upper_lse = (jnp.roll(x[1], 1, axis=1)[:, ::-1] for x in (out, lse))
    upper_lse = upper_lse.at[:, -1].set(-jnp.inf)
    wide = lse[0].dtype
    found, total = merge(out[0].astype(wide), lse[0], upper.astype(wide), upper_lse)
    return found.astype(call["query"].dtype), total
