import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.cache import Full, PerHead, PerLayer, Scored, SinkWindow
from sinkjax.cache.budgets import Pyramid
from sinkjax.cache.policies import TOVA, Knorm, StreamingLLM
from sinkjax.cache.quantised import Quantised
from sinkjax.models import Decoder
from sinkjax.stream import Sampler, Session, generate

CACHE = SinkWindow(3, 11)


def run(model, session, count, prompt=(), **options):
    return [
        (event.token, event.logprob)
        for event in generate(
            model, list(prompt), cache=session, max_new_tokens=count, chunk_size=9, **options
        )
    ]


@pytest.mark.parametrize("description", [CACHE, Full(60)])
def test_resumed_is_as_if_never_stopped(model, tmp_path, description):
    whole = run(model, Session.start(model, description, seed=3), 50, [1, 2, 3])
    session = Session.start(model, description, seed=3)
    first = run(model, session, 21, [1, 2, 3])
    session.save(tmp_path / "stream.npz")
    rest = run(model, Session.load(tmp_path / "stream.npz"), 29)
    assert first + rest == whole  # bit for bit, log-probabilities too
    assert rest != run(model, Session.start(model, description, seed=3), 29, [1, 2, 3])


def test_the_file_holds_everything(model, tmp_path):
    session = Session.start(model, CACHE, seed=11)
    run(model, session, 30, [1, 2], sampler=Sampler(temperature=0))
    session.save(tmp_path / "a")
    again = Session.load(tmp_path / "a")
    assert jax.tree.structure(again.cache) == jax.tree.structure(session.cache)
    for a, b in zip(jax.tree.leaves(again.cache), jax.tree.leaves(session.cache), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    fields = ("seed", "position", "pending", "tail")
    assert [getattr(again, f) for f in fields] == [getattr(session, f) for f in fields]
    assert os.listdir(tmp_path) == ["a"]


def test_bfloat16(model, tmp_path):
    cache = model.init_cache(CACHE, 1, dtype="bfloat16")
    cache = jax.tree.map(lambda x: (x + 1.7).astype(x.dtype), cache)
    Session(cache).save(tmp_path / "a")
    again = Session.load(tmp_path / "a")
    assert again.cache.layers[0].key.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.cache.layers[0].key, cache.layers[0].key)


@dataclasses.dataclass(frozen=True)
class Mine(Knorm):
    """A policy of a user's."""

    weight: float = 1.0


def scored(policy, **options):
    return Scored(policy, **{"budget": 14, "num_sink_tokens": 3, "window": 5} | options)


@pytest.mark.parametrize(
    "description",
    [
        PerLayer((Full(20),)),
        PerLayer((scored(TOVA()),)),
        scored(StreamingLLM(), budget=Pyramid(14, window=5)),
        PerHead((((0,), PerLayer((SinkWindow(2, 5, "absolute"),))),)),
        Quantised(SinkWindow(3, 40), bits=4, group_size=4, residual=8),
    ],
    ids=lambda description: type(description).__name__,
)
def test_every_description_comes_back(model, tmp_path, description):
    """Nested as they are, with the arrays of their states."""
    session = Session.start(model, description, seed=3)
    session.cache = jax.tree.map(lambda x: (x + 1).astype(x.dtype), session.cache)
    session.tail, session.dropped = (5, 6), 7
    session.save(tmp_path / "a")
    again = Session.load(tmp_path / "a")
    assert again.cache.description == description and hash(again.cache.description)
    assert jax.tree.structure(again.cache) == jax.tree.structure(session.cache)
    for a, b in zip(jax.tree.leaves(again.cache), jax.tree.leaves(session.cache), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    again.check(model)
    assert (again.seed, again.tail, again.dropped) == (3, (5, 6), 7)


def test_a_description_of_ones_own(model, tmp_path):
    session = Session.start(model, PerLayer((scored(Mine(weight=0.5)),)))
    session.save(tmp_path / "a")
    with pytest.raises(ValueError, match="the cache was made with a Mine, which is none of sink"):
        Session.load(tmp_path / "a")
    again = Session.load(tmp_path / "a", descriptions=[Mine])
    assert again.cache.description == session.cache.description
    odd = dataclasses.replace(session.cache, description=scored(Mine(weight=np.float32)))
    with pytest.raises(ValueError, match="description: expected dataclasses, tuples, numbers"):
        Session(odd).save(tmp_path / "b")


def test_the_size_is_constant(model, tmp_path):
    session = Session.start(model, CACHE)
    sizes = []
    for _ in range(2):
        run(model, session, 100, [1])
        session.save(tmp_path / "a")
        sizes.append((tmp_path / "a").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 64  # digits of the position


def test_a_character_cut_by_the_stop_is_completed(model, tmp_path):
    """The text decoder starts again with what was drawn last."""

    class Script:
        bos_id = 256

        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8)

        def stream_decoder(self):
            import codecs

            inner = codecs.getincrementaldecoder("utf-8")(errors="replace")

            class Decoder:
                def push(self, token):
                    return inner.decode(bytes([token]))

                def flush(self):
                    return inner.decode(b"", final=True)

            return Decoder()

    session = Session.start(model, CACHE)
    run(model, session, 1, [1])
    cut = "aë→".encode()[:-1]
    session.tail, session.pending = tuple(cut), cut[-1]
    session.save(tmp_path / "a")
    # a model that says nothing but the last byte of the arrow
    graph, parameters = nnx.split(model)
    last = nnx.merge(graph, jax.tree.map(jnp.copy, parameters))
    last.embedding.embedding[...] = jnp.ones_like(last.embedding.embedding[...])
    last.head.kernel[...] = jnp.zeros_like(last.head.kernel[...])
    final = "→".encode()[-1]
    graph, parameters = nnx.split(last)
    run_once = jax.jit(lambda parameters, x: nnx.merge(graph, parameters)(x).hidden)
    hidden = run_once(parameters, jnp.asarray([[cut[-1]]]))[0, -1]
    last.head.kernel[...] = last.head.kernel[...].at[:, final].set(hidden)
    event = next(
        generate(
            last,
            "",
            cache=Session.load(tmp_path / "a"),
            tokenizer=Script(),
            sampler=Sampler(temperature=0),
        )
    )
    assert event.token == final and event.text == "→"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 2},
        {"head_dim": 6},
        {"num_heads": 4, "num_kv_heads": 2},
        {"windows": (8,), "num_sink_tokens": 2},
        {"dtype": "bfloat16"},
    ],
)
def test_another_model_is_refused(model, changes):
    import dataclasses

    config = dataclasses.replace(model.config, **changes)
    other = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="^cache: the model"):
        generate(other, [1], cache=Session.start(model, CACHE))


def test_what_is_not_a_session(tmp_path, model):
    with pytest.raises(FileNotFoundError):
        Session.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    Session.start(model, CACHE).save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "other.npz", "array.npy", "cut", "empty"):
        with pytest.raises(ValueError, match="is not a saved session"):
            Session.load(tmp_path / name)


def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    """A real write error (RLIMIT_FSIZE): the file of before is whole, and nothing else is left."""
    Session.start(model, CACHE, seed=5).save(tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    program = f"""
import resource, signal, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
from sinkjax.stream import Session
session = Session.load({str(tmp_path / "a")!r})
session.seed = 6
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
try:
    session.save({str(tmp_path / "a")!r})
except OSError as error:
    print("refused", error.errno)
"""
    assert hasattr(signal, "SIGXFSZ")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("refused")
    assert os.listdir(tmp_path) == ["a"]
    assert Session.load(tmp_path / "a").seed == 5
