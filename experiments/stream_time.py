"""What a token costs: a cache of sinks and a window beside the ways that it replaces.

The part of `streaming.py` that times; it has no command of its own.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax.cache import Cache, Full, SinkWindow
from sinkjax.models import Decoder, preset
from sinkjax.ops.decode import decode_attention
from sinkjax.ops.rope import Rope, cos_sin, rotate

SINKS = 4
CHUNK = 256
ROOM = 512  # tokens that a dense cache is left to take
TOKENS = 16  # that one call makes


def random_model(context_length: int, num_layers: int = 4) -> Decoder:
    """The preset `small`, width 256 on bytes, of other length and depth; time does not read weights."""
    config = dataclasses.replace(
        preset("small"), num_layers=num_layers, context_length=context_length
    )
    return Decoder(config, rngs=nnx.Rngs(0))


class Step:
    """Some tokens per row through a model and its state, greedily, again and again.

    Args:
      run: of parameters, state and tokens [B, 1]; gives logits [B, V] and the next state, whose memory
        is that of the last.
      tokens: that one call makes, in one program; `TOKENS` by default.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        parameters: Any,
        state: Any,
        rows: int,
        tokens: int | None = None,
    ):
        self.tokens = tokens or TOKENS
        # A flat list: what flattens the tree of a model at every call is Python.
        leaves, tree = jax.tree.flatten(parameters)

        def call(leaves, state, drawn):
            def one(carry, _):
                state, drawn = carry
                logits, state = run(jax.tree.unflatten(tree, leaves), state, drawn)
                return (state, jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)), logits

            (state, drawn), logits = jax.lax.scan(one, (state, drawn), length=self.tokens)
            return logits[-1], drawn, state

        self._run = jax.jit(call, donate_argnums=1)
        self._parameters, self._state = leaves, state
        self._drawn = jnp.zeros((rows, 1), jnp.int32)

    def __call__(self) -> jax.Array:
        """Logits [B, V] after the last of the tokens."""
        logits, self._drawn, self._state = self._run(self._parameters, self._state, self._drawn)
        return logits

    def seconds(self, calls: int) -> float:
        """Per token, until the last one is done."""
        since = time.perf_counter()
        for _ in range(calls):
            logits = self()
        jax.block_until_ready((logits, self._state))
        return (time.perf_counter() - since) / (calls * self.tokens)


def in_turn(
    steps: Mapping[str, Step], rounds: int, least: float = 1.0, most: int = 5000
) -> dict[str, list[float]]:
    """Seconds per token of each, by round: measured in turn, forth and back, compiled and warm before.

    Args:
      rounds: measurements of each.
      least: seconds that one takes, about. A stream runs for long: the first tens of steps after
        another way has had the processor's caches are not its speed.
      most: so many tokens at most.
    """
    counts = {}
    for name, step in steps.items():
        step.seconds(1)
        tokens = min(least / step.seconds(1), most)
        counts[name] = max(1, int(tokens / step.tokens))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            found[name].append(steps[name].seconds(counts[name]))
    return found


def over(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios of the same round: the machine may be busier in others."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


# --- ours


def cached(decoder: Decoder, cache: Cache, tokens: int | None = None) -> Step:
    """A step on any cache of the library."""
    graph, parameters = nnx.split(decoder)

    def run(parameters, cache, tokens):
        output = nnx.merge(graph, parameters)(tokens, cache=cache)
        return output.logits[:, -1], output.cache

    return Step(run, parameters, cache, cache.time.shape[0], tokens)


def aged(decoder: Decoder, description: SinkWindow, rows: int, clock: int) -> Cache:
    """The cache after `clock` tokens of a stream, without those that it has forgotten since.

    The first tokens are fed, then the last ones at their own positions: what the stream leaves.
    """
    cache = decoder.init_cache(description, rows)
    graph, parameters = nnx.split(decoder)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(parameters, cache, tokens, positions):
        return nnx.merge(graph, parameters)(tokens, positions=positions, cache=cache).cache

    P, W = description.sink_slots, description.window
    positions = np.asarray([*range(min(P, clock)), *range(max(P, clock - W), clock)])
    for start in range(0, len(positions), CHUNK):
        part = np.full((rows, CHUNK), -1, np.int32)
        have = positions[start : start + CHUNK]
        part[:, : len(have)] = have
        cache = run(parameters, cache, token_at(part), part)
    return cache


def nearly_full(decoder: Decoder, length: int) -> Cache:
    """A dense cache of one row, all but `ROOM` tokens of it taken; time does not read the keys."""
    cache = decoder.init_cache(Full(length), 1)
    slot, clock = jnp.arange(length, dtype=jnp.int32)[None], length - ROOM
    held = jnp.where(slot < clock, slot, -1)
    return dataclasses.replace(cache, positions=(held,), time=jnp.full((1,), clock, jnp.int32))


def token_at(positions: np.ndarray) -> np.ndarray:
    """Some token for each position."""
    return (np.abs(positions) * 7919 % 257).astype(np.int32)


# --- the ways that it replaces


def recomputed(decoder: Decoder, slots: int, rows: int) -> Step:
    """The last `slots` tokens encoded anew for every token; logits of the last one only."""
    graph, parameters = nnx.split(decoder)

    def run(parameters, history, tokens):
        decoder = nnx.merge(graph, parameters)
        history = jnp.concatenate([history[:, 1:], tokens], axis=1)
        return decoder.head(decoder(history).hidden[:, -1:])[:, 0], history

    return Step(run, parameters, jnp.zeros((rows, slots), jnp.int32), rows)


def _rotating(decoder: Decoder, cache: Cache, extend: Callable, by_age: bool) -> Step:
    """A decoder on the tokens of a full cache of ours, its keys as they came out of their projection:
    leaves per layer [B, K, C, H] and a clock, all donated."""
    graph, parameters = nnx.split(decoder)
    positions = cache.positions[0]
    order = jnp.argsort(positions, axis=1) if by_age else jnp.arange(positions.shape[1])[None]
    rope = _rope(decoder)

    def raw(state):
        key = rotate(state.key.swapaxes(1, 2), -positions, rope).swapaxes(1, 2)
        return tuple(
            jnp.take_along_axis(leaf, order[:, None, :, None], axis=2)
            for leaf in (key, state.value)
        )

    def run(parameters, state, tokens):
        decoder = nnx.merge(graph, parameters)
        leaves, clock = state
        attend = extend(clock)
        x, kept = decoder.embed(tokens), []
        for layer, old in enumerate(leaves):
            block = decoder.layer(layer)
            y, attention = block.attention_norm(x), block.attention
            out, new = attend(old, attention.query(y), attention.key(y), attention.value(y))
            x = x + attention.out(out)
            x = x + block.mlp(block.mlp_norm(x))
            kept.append(new)
        return decoder.head(decoder.final_norm(x))[:, 0], (tuple(kept), clock + 1)

    state = tuple(map(raw, cache.layers)), jnp.copy(cache.time)
    return Step(run, parameters, state, cache.time.shape[0])


def _rope(decoder: Decoder) -> Rope:
    rope = decoder.config.layer(0).rope
    if rope is None:
        raise ValueError("decoder: expected one with RoPE, got rope_theta=None")
    return rope


def _turn(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def as_published(decoder: Decoder, cache: Cache) -> Step:
    """The step of the StreamingLLM repository, line by line: evict by slices and concatenation, append
    the key as it is, rotate all keys at their places in the cache, repeat them for the query heads
    of their group, matmul, softmax, matmul.

    Compiled as one program, and cosines and sines come from a table once for all layers.

    Source: mit-han-lab/streaming-llm, `kv_cache.py` and `pos_shift/modify_llama.py`.
    """
    config = decoder.config
    H, G, slots = config.head_dim, config.num_heads // config.num_kv_heads, cache.capacity
    P = SINKS
    rope = _rope(decoder)

    def extend(clock):
        cos, sin = cos_sin(jnp.arange(slots), rope)

        def attend(old, query, key, value):
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
            keys, values = (
                jnp.concatenate([leaf[:, :, :P], leaf[:, :, P + 1 :], new], axis=2)
                for leaf, new in zip(old, (key, value), strict=True)
            )
            query = _turn(query, cos[-1], sin[-1])
            turned = jnp.repeat(_turn(keys, cos, sin), G, axis=1)
            weights = jax.nn.softmax(query @ turned.swapaxes(2, 3) / H**0.5, axis=-1)
            out = weights @ jnp.repeat(values, G, axis=1)
            return out.swapaxes(1, 2), (keys, values)

        return attend

    return _rotating(decoder, cache, extend, by_age=True)


def in_a_ring(decoder: Decoder, cache: Cache) -> Step:
    """The same function as fast as it goes while all keys are rotated at each step: a ring in place
    of the concatenations, and our attention, which repeats no key."""
    rows, slots = cache.time.shape[0], cache.capacity
    P, W = SINKS, slots - SINKS
    rope = _rope(decoder)

    def extend(clock):
        slot, row = jnp.arange(slots), jnp.arange(rows)
        here = P + (clock - P) % W
        # Places in the order of age, the newest token last.
        place = jnp.where(slot < P, slot, slots - 1 - (here[:, None] - slot) % W)
        table = cos_sin(jnp.arange(slots), rope)
        last = jnp.full((rows, 1), slots - 1)
        at_keys = [x[place][:, None] for x in table]  # [B, 1, C, H/2]
        at_query = [x[last][:, :, None] for x in table]  # [B, 1, 1, H/2]

        def attend(old, query, key, value):
            keys, values = (
                leaf.at[row, :, here].set(new[:, 0], unique_indices=True)
                for leaf, new in zip(old, (key, value), strict=True)
            )
            out = decode_attention(
                _turn(query, *at_query),
                _turn(keys, *at_keys),
                values,
                query_positions=last,
                key_positions=place,
            )
            return out, (keys, values)

        return attend

    return _rotating(decoder, cache, extend, by_age=False)


# --- what is measured


def per_token(
    slots: int, rows: int, text_length: int | None, rounds: int, num_layers: int = 4
) -> dict[str, Any]:
    """Seconds of a token on a full cache of `slots`, ours and the others, at one batch size.

    All make `TOKENS` in a call, but for "one per call": ours, with what it takes to start a program
    from Python for every token.

    Args:
      slots: C, for ours, recomputation and rotation.
      text_length: tokens of the dense cache, all held; None leaves out the dense cache and
        recomputation, which are for one row.
      rounds: measurements of each.

    Returns:
      the sizes; `seconds`, medians by way; `over`, medians of the ratios to ours; `cache_bytes`.
    """
    decoder = random_model(max(slots, text_length or 0), num_layers)
    ours = aged(decoder, SinkWindow(SINKS, slots - SINKS), rows, 3 * slots)
    sizes = {"ours": ours.nbytes}
    step, single = (cached(decoder, jax.tree.map(jnp.copy, ours), n) for n in (None, 1))
    turning = {
        "one per call": single,
        "rotate, as published": as_published(decoder, ours),
        "rotate in a ring": in_a_ring(decoder, ours),
    }
    found = in_turn({"ours": step, **turning}, rounds)
    seconds = {name: statistics.median(times) for name, times in found.items()}
    ratios = {name: over(found[name], found["ours"]) for name in turning}
    others: dict[str, tuple[Step, int]] = {}
    if text_length is not None:
        dense = nearly_full(decoder, text_length)
        sizes["dense"] = dense.nbytes
        # It has room for so many tokens.
        others["dense"] = cached(decoder, dense), min(rounds, ROOM // TOKENS - 2)
        others["recompute"] = recomputed(decoder, slots, rows), rounds
    for name, (other, count) in others.items():
        most = (ROOM - 2 * TOKENS) // count if name == "dense" else 5000
        found = in_turn({"ours": step, name: other}, count, most=most)
        seconds[name] = statistics.median(found[name])
        ratios[name] = over(found[name], found["ours"])
    return {
        "slots": slots,
        "rows": rows,
        "text_length": text_length,
        "seconds": seconds,
        "over": ratios,
        "cache_bytes": sizes,
    }


def at_positions(
    slots: int, early: int, late: int, rounds: int, num_layers: int = 4
) -> dict[str, Any]:
    """Seconds of a step of one stream at two places of the text, in turns, and their ratio."""
    decoder = random_model(slots, num_layers)
    description = SinkWindow(SINKS, slots - SINKS)
    caches = {at: aged(decoder, description, 1, at) for at in (early, late)}
    sizes = [cache.nbytes for cache in caches.values()]
    steps = {str(at): cached(decoder, cache) for at, cache in caches.items()}
    found = in_turn(steps, rounds)
    first, second = found[str(early)], found[str(late)]
    return {
        "slots": slots,
        "positions": [early, late],
        "seconds": [statistics.median(first), statistics.median(second)],
        "ratio": over(second, first),
        "cache_bytes": sizes,
    }
