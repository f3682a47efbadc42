"""Streams of the library on a mesh: they come and go, and their tokens are those of one device."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sinkjax.cache import Full, PagedTopK, PerHead, Quantised, Scored, SinkWindow
from sinkjax.cache.policies import H2O
from sinkjax.models import DecoderConfig, from_parameters, parameters
from sinkjax.models.parameters import abstract
from sinkjax.sharding import cache_shardings, make_mesh, shardings
from sinkjax.stream import Batch, Sampler, Session, generate, prefill, score

ROWS, C, CHUNK = 8, 23, 7
CACHE = SinkWindow(3, C - 3)
CONFIG = DecoderConfig(
    vocab_size=48,
    model_dim=24,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=10,
    mlp_dim=40,
    context_length=C,
)
SAMPLER = Sampler(temperature=0.9, top_k=11)
MESHES = [
    pytest.param({"data": 2, "expert": 2, "model": 2, "explicit": True}, id="experts-explicit"),
    *(
        pytest.param({"data": data, "model": 8 // data, "explicit": explicit}, marks=slow, id=name)
        for slow in [pytest.mark.slow]
        for data, explicit, name in [
            (4, False, "data-4"),
            (2, False, "data-2"),
            (4, True, "data-4-explicit"),
            (2, True, "data-2-explicit"),
        ]
    ),
]
COLLECTIVE = r" = .*? (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)\S*\("


def made(config=CONFIG, mesh=None):
    """A model of random numbers, on a mesh or on one device."""
    draw = np.random.default_rng(0).normal
    shapes = parameters(abstract(config))
    params = jax.tree.map(lambda x: np.float32(draw(scale=0.12, size=x.shape)), shapes)
    layout = jax.devices()[0] if mesh is None else shardings(shapes, mesh)
    return from_parameters(config, jax.device_put(params, layout))


# Prompt, seed and number of tokens: of any age, in the prompt and past the end of the ring.
STREAMS = [([n + 1] * (1 + 3 * n), n, 9 + 5 * (n % 3)) for n in range(ROWS + 2)]
CUT, AFTER = 3, 6
"""The stream that is retired in the middle, and after how many tokens."""


def play(model):
    """Tokens and log-probabilities by stream, of which one is continued in a row of its own."""
    batch = Batch(model, CACHE, rows=ROWS, chunk_size=CHUNK, sampler=SAMPLER)
    ids = [batch.admit(p, seed=s, max_new_tokens=n) for p, s, n in STREAMS]  # two have to wait
    found = {}
    for id, event in batch.run():
        found.setdefault(id, []).append((event.token, event.logprob))
        if id == ids[CUT] and len(found[id]) == AFTER:
            session = batch.session(id)
            batch.retire(id)
            ids.append(batch.admit(session=session))
        if id == ids[-1] and len(found[id]) == STREAMS[CUT][2] - AFTER:
            batch.retire(id)
    found[ids[CUT]] += found.pop(ids[-1])
    return [found[id] for id in ids[: len(STREAMS)]], batch


def alone(model, prompt, seed, count, cache=CACHE):
    options = {"sampler": SAMPLER, "max_new_tokens": count, "chunk_size": CHUNK}
    events = generate(model, prompt, cache=cache, seed=seed, **options)
    return [(event.token, event.logprob) for event in events]


@pytest.fixture(scope="module")
def expected():
    model = made()
    return [alone(model, *stream) for stream in STREAMS]


@pytest.mark.parametrize("axes", MESHES)
def test_streams_that_come_and_go_are_those_of_one_device(axes, expected):
    mesh = make_mesh(**axes)
    found, batch = play(made(mesh=mesh))
    assert len({token for events in found for token, _ in events}) > 20
    for events, wanted in zip(found, expected, strict=True):
        same(events, wanted)
    cache, programs = batch._cache, (batch._step, batch._draw, batch._put)
    assert lies(cache, mesh)
    part = (ROWS * axes["model"] // 8, 4 // axes["model"], C, 10)
    assert cache.layers[0].key.sharding.shard_shape((ROWS, 4, C, 10)) == part
    assert [jitted(program)._cache_size() for program in programs] == [1, 1, 1]
    tokens, keys = np.zeros((ROWS, 1), np.int32), np.zeros((ROWS, 2), np.uint32)
    arguments = (batch._arrays, cache, tokens, keys, np.ones(ROWS, bool))
    text = compiled(mesh, batch._step, *arguments)
    moved = re.findall(rf".*{COLLECTIVE}.*", text)
    # C is no size of anything else. Each leaf is updated where it lies.
    assert moved and not [line for line in moved if re.search(rf"[\[,]{C}[,\]]", line)]
    assert aliased(text) == len(jax.tree.leaves(cache))


def same(events, wanted):
    assert [token for token, _ in events] == [token for token, _ in wanted]
    np.testing.assert_allclose([x for _, x in events], [x for _, x in wanted], atol=2e-4)


def lies(cache, mesh) -> bool:
    """Whether a cache is laid out by the rules."""
    layout = jax.tree.leaves(cache_shardings(cache, mesh))
    leaves = jax.tree.leaves(cache)
    return all(x.sharding.is_equivalent_to(p, x.ndim) for x, p in zip(leaves, layout, strict=True))


def jitted(program):
    return program.__wrapped__


def compiled(mesh, program, *arguments) -> str:
    with jax.set_mesh(mesh):
        return jitted(program).lower(*arguments).compile().as_text()


def aliased(text):
    header = text[: text.index("entry_computation_layout")]
    return header.count("may-alias") + header.count("must-alias")


@pytest.mark.slow
def test_a_session_moves_between_one_device_and_meshes(tmp_path):
    """Saved on one device, continued on a mesh, saved and forked there, continued on another."""
    prompt, path = list(range(9)), tmp_path / "session"
    model, options = made(), {"sampler": SAMPLER, "chunk_size": CHUNK}
    wanted = [token for token, _ in alone(model, prompt, 5, 34)]
    session = Session.start(model, CACHE, seed=5)
    found, begin = [], prompt
    first, second = make_mesh(2, 4, explicit=True), make_mesh(2, 2, expert=2)
    for place in (None, first, second):
        here = model if place is None else made(mesh=place)
        fork = session.fork()
        for each in (session, fork):
            events = generate(here, begin, cache=each, max_new_tokens=11, **options)
            drawn = [event.token for event in events]
        found += drawn
        assert place is None or lies(fork.cache, place)
        fork.save(path)
        session, begin = Session.load(path), []
    assert found == wanted[:33]
    back = generate(model, [], cache=session, max_new_tokens=1, **options)
    assert [event.token for event in back] == wanted[33:]


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_what_does_not_divide_stays_whole(explicit):
    """Seven rows on four groups of devices, three key heads on two: every device has them all."""
    config = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3)
    mesh = make_mesh(4, 2, explicit=explicit)
    batch = Batch(made(config, mesh), CACHE, rows=7, chunk_size=CHUNK, sampler=SAMPLER)
    ids = [batch.admit(p, seed=s, max_new_tokens=n) for p, s, n in STREAMS]
    found = {}
    for id, event in batch.run():
        found.setdefault(id, []).append((event.token, event.logprob))
    model = made(config)
    for id, stream in zip(ids, STREAMS, strict=True):
        same(found[id], alone(model, *stream))
    key = batch._cache.layers[0].key
    assert key.sharding.shard_shape(key.shape) == key.shape and lies(batch._cache, mesh)
    odd = dataclasses.replace(CONFIG, num_heads=5, num_kv_heads=5)
    with pytest.raises(ValueError, match=r"attention/.* divisible by 2 \(mesh axis 'model'"):
        made(odd, mesh)


KINDS = {
    "full": Full(31),
    "pins": SinkWindow("auto", C - 4),
    "scored": Scored(H2O(), budget=11, num_sink_tokens=2, window=5),
    "quantised": Quantised(SinkWindow(3, 29), group_size=3, residual=4),
    "heads": PerHead((((0, 2), SinkWindow(2, 11)), ((1, 3), CACHE))),
    "paged": PagedTopK(30, 5, 4, num_recent_pages=1, num_dense_layers=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_all_kinds(kind, explicit):
    config = dataclasses.replace(CONFIG, num_layers=2, scan_layers=True, context_length=64)
    mesh = make_mesh(2, 2, explicit=explicit)
    batch = Batch(made(config, mesh), KINDS[kind], rows=4, chunk_size=CHUNK, sampler=SAMPLER)
    programs = (jitted(batch._step), jitted(batch._put))  # which other kinds may have run
    before = [program._cache_size() for program in programs]
    streams = [(prompt[:12], seed, 14) for prompt, seed, _ in STREAMS[:5]]
    ids = [batch.admit(p, seed=s, max_new_tokens=n) for p, s, n in streams]
    found = {}
    for id, event in batch.run():
        found.setdefault(id, []).append((event.token, event.logprob))
    model = made(config)
    for id, stream in zip(ids, streams, strict=True):
        same(found[id], alone(model, *stream, cache=KINDS[kind]))
    assert lies(batch._cache, mesh)
    assert [program._cache_size() for program in programs] == [count + 1 for count in before]


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_rows_of_a_prompt_and_losses(explicit):
    """`prefill` of many rows of different lengths, and `score`."""
    mesh = make_mesh(4, 2, explicit=explicit)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (ROWS, 19))
    lengths = 5 + 2 * np.arange(ROWS)
    results = []
    for model in (made(), made(mesh=mesh)):
        cache = model.init_cache(CACHE, ROWS)
        logits, cache = prefill(model, cache, tokens, lengths=lengths, chunk_size=CHUNK)
        again, cache = prefill(model, cache, tokens[:, :3], chunk_size=CHUNK)
        nll = [part.nll for part in score(model, [tokens[0]], cache=CACHE, chunk_size=CHUNK)]
        results.append(jax.tree.map(np.asarray, (logits, again, cache, nll)))
    assert lies(cache, mesh)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
