"""Keep what queries yet to come are expected to look at."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sinkjax.cache.policies.evidence import Evidence
from sinkjax.ops.rope import cos_sin, rotate


@dataclasses.dataclass(frozen=True)
class ExpectedAttention:
    r"""Attention expected of a normally distributed query, times the length of the value.

    $\big(\mathrm{softmax}_i(s\,\mu^\top k_i + \tfrac{s^2}{2} k_i^\top \Sigma k_i) + \epsilon\big)\,
    \lVert v_i \rVert_2$ with s the scale, μ and Σ the mean and covariance of the last w queries before
    their rotation, turned by the mean rotation of the next positions; mean over the group.

    The first tokens are not ranked: they have no part in the softmax and score ∞, and their queries,
    which are outliers, none in μ and Σ. A soft cap of the logits is not modelled.

    Args:
        num_queries: w. kvpress takes the whole prompt when it compresses one, and as many as here
            while decoding.
        num_future: positions that the rotation is averaged over, from the next one on.
        num_sink_tokens: tokens at the start of the text that are left out.
        use_covariance: False leaves Σ out.
        use_value_norm: False leaves ε and the value out.
        epsilon: ε.

    Source: Devoto et al. 2025, arXiv 2510.00636; defaults of kvpress, expected_attention_press.py.
    """

    num_queries: int = 256
    num_future: int = 512
    num_sink_tokens: int = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.0
    discount = None

    def __post_init__(self) -> None:
        for name, least in (("num_queries", 1), ("num_future", 1), ("num_sink_tokens", 0)):
            if getattr(self, name) < least:
                got = getattr(self, name)
                raise ValueError(f"ExpectedAttention.{name}: expected at least {least}, got {got}")

    def scores(self, evidence: Evidence) -> Float[Array, "B K S"]:
        """Expected weights times values, ∞ for the first tokens."""
        if evidence.queries is None or evidence.query_positions is None:
            raise ValueError(
                "evidence: ExpectedAttention needs queries and query_positions, got None"
            )
        dtype = jnp.promote_types(evidence.key.dtype, jnp.float32)
        key = evidence.key.astype(dtype)
        mean, covariance = self._future_query(evidence, dtype)
        B, K, S, H = key.shape
        scale = H**-0.5 if evidence.scale is None else evidence.scale
        mean_BKGH = mean.reshape(B, K, -1, H)
        logits = scale * jnp.einsum("BKGH,BKSH->BKGS", mean_BKGH, key)
        if self.use_covariance:
            covariance = covariance.reshape(B, K, -1, H, H)
            spread = jnp.einsum("BKSH,BKGHI,BKSI->BKGS", key, covariance, key)
            logits += scale**2 / 2 * spread
        ranked = evidence.held & (evidence.positions >= self.num_sink_tokens)
        scores = jax.nn.softmax(logits, axis=-1, where=ranked[:, :, None]).mean(2)
        if self.use_value_norm:
            length = jnp.linalg.norm(evidence.value.astype(dtype), axis=-1)
            scores = (scores + self.epsilon) * length
        return jnp.where(ranked, scores, jnp.inf)

    def _future_query(self, evidence: Evidence, dtype) -> tuple[Array, Array]:
        """Mean [B, N, H] and covariance [B, N, H, H] of a query at the mean of the next rotations."""
        at, rope = evidence.query_positions, evidence.rope
        query = evidence.queries.astype(dtype)
        if rope is not None:
            query = rotate(query, -jnp.maximum(at, 0), rope)
        counts = (at >= self.num_sink_tokens).astype(dtype)
        counts /= jnp.maximum(counts.sum(-1, keepdims=True), 1)
        mean = jnp.einsum("Bw,BwNH->BNH", counts, query)
        centred = query - mean[:, None]
        covariance = jnp.einsum("Bw,BwNH,BwNI->BNHI", counts, centred, centred)
        if rope is None:
            return mean, covariance
        future = evidence.time[:, None] + jnp.arange(self.num_future, dtype=jnp.int32)
        cos, sin = (factor.mean(1) for factor in cos_sin(future, rope, dtype))

        def turn(x: Array) -> Array:
            """Along the last axis of [B, ..., H]."""
            shape = (x.shape[0], *(1 for _ in x.shape[2:]), -1)
            c, s = cos.reshape(shape), sin.reshape(shape)
            first, second = jnp.split(x, 2, axis=-1)
            return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

        return turn(mean), turn(turn(covariance).swapaxes(-1, -2))
