"""The two programs of decoding: draw from logits, and read one token per row and draw."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sinkjax.cache import keep_layout
from sinkjax.sharding import constrain
from sinkjax.stream.sampler import Sampler
from sinkjax.stream.structure import Structure, by_rows, for_rows, whole_logits


def key_data(seed: int) -> np.ndarray:
    """The bits of a stream's key. Token n is drawn with `fold_in(key(seed), n)`."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


@functools.lru_cache(maxsize=16)
def functions(
    structure: Structure, sampler: Sampler, forbidden: tuple[int, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`draw(logits [B, V], time [B], keys [B, k])` and `step(arrays, cache, tokens [B, 1], keys,
    active [B] | None)`, with the arrays of `split` and the `key_data` of each row; a row that is not
    active notices nothing.

    Both give tokens and log-probabilities [B], whole on every device of a mesh; `step`, which is
    donated the cache, also the cache. Kept per model structure and sampler.
    """

    def drawn(logits, time, keys):
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), time)
        token = jax.vmap(lambda key, row: sampler(key, row, forbidden))(keys, logits)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    def draw(logits, time, keys):
        found = for_rows(drawn, logits, time, keys)
        return jax.tree.map(lambda x: constrain(x, PartitionSpec()), found)

    def step(arrays, cache, tokens, keys, active=None):
        positions = cache.next_positions(1)
        if active is not None:
            positions = jnp.where(by_rows(active)[:, None], positions, -1)
        output = structure.model(arrays)(by_rows(tokens), positions=positions, cache=cache)
        token, logprob = draw(whole_logits(output.logits[:, -1]), output.cache.time, keys)
        return token, logprob, keep_layout(output.cache)

    return structure.jit(draw), structure.jit(step, donate_argnames=("cache",))
