"""The two programs of decoding: draw from logits, and read one token per row and draw."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.stream.sampler import Sampler


def key_data(seed: int) -> np.ndarray:
    """The bits of a stream's key. Token n is drawn with `fold_in(key(seed), n)`."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


@functools.lru_cache(maxsize=16)
def functions(
    graph: nnx.GraphDef[Any], sampler: Sampler, forbidden: tuple[int, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`draw(logits [B, V], time [B], keys [B, k])` and `step(parameters, cache, tokens [B, 1], keys,
    active [B] | None)`, with the `key_data` of each row; a row that is not active notices nothing.

    Both give tokens and log-probabilities [B]; `step`, which is donated the cache, also the cache.
    Kept per model structure and sampler.
    """

    def draw(logits, time, keys):
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), time)
        token = jax.vmap(lambda key, row: sampler(key, row, forbidden))(keys, logits)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def step(parameters, cache, tokens, keys, active=None):
        positions = None
        if active is not None:
            positions = jnp.where(active[:, None], cache.next_positions(1), -1)
        output = nnx.merge(graph, parameters)(tokens, positions=positions, cache=cache)
        token, logprob = draw(output.logits[:, -1], output.cache.time, keys)
        return token, logprob, output.cache

    return jax.jit(draw), step
