"""The TPU decode kernel against its specification, in interpret mode and compiled ahead of time."""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sinkjax_kernels import normalizers
from sinkjax_kernels.decode import int8, pallas_tpu, reference, tpu_ring

# Tests are no package: the suite is loaded from beside this file, once.
_SPEC = importlib.util.spec_from_file_location(
    "conformance", pathlib.Path(__file__).with_name("conformance.py")
)
conformance = sys.modules.setdefault("conformance", importlib.util.module_from_spec(_SPEC))
if not hasattr(conformance, "CASES"):
    _SPEC.loader.exec_module(conformance)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows at clocks of their own on rings that are full, nearly empty, or full to the brim with sinks.

    The sink slots hold the first tokens of the text, or `pinned` ones from anywhere in it.
    One row of a step writes nothing. Sizes are pairwise distinct.
    Leaves of 128 or 256 numbers per slot lie as they are, others with their slots in lanes.
    """

    tokens: int = 1
    slots: int = 131
    chunk: int = 128
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 16
    value_dim: int = 24
    batch: int = 3
    sink_slots: int = 5
    pinned: bool = False
    sink_query: bool = True
    window: int | None = 100
    sinks: str | None = "head"
    normalizer: str = "softmax"
    learned: bool = False
    soft_cap: float | None = None
    per_head: bool = False
    is_int8: bool = False
    dtype: str = "float32"
    cache_dtype: str | None = None
    writes: bool = True
    skip: bool | None = None
    outside: int = -1

    @property
    def clocks(self) -> np.ndarray:
        first = np.array([509, 60, 17, 33])[: self.batch]
        clocks = first[:, None] + np.arange(self.tokens)
        if self.tokens > 2:
            clocks[1, 1] = -1  # padding
        return clocks

    @property
    def key_positions(self) -> np.ndarray:
        K, S, P = self.heads[1] if self.per_head else 1, self.slots, self.sink_slots
        positions = np.full((self.batch, K, S), -1)
        for b, k in np.ndindex(self.batch, K):
            for t in range(self.clocks[b].max() + 1):
                at = t if t < P else P + (t - P) % (S - P)
                positions[b, k, at] = t
            if self.pinned:
                positions[b, k, :P] = 3 + 9 * np.arange(P)
            if k:  # each head has dropped some more
                positions[b, k, 7 * k :: 11] = -1
        return positions

    @property
    def write_slots(self) -> np.ndarray:
        clock, P = self.clocks[:, 0], self.sink_slots
        slots = np.where(clock < P, clock, P + (clock - P) % (self.slots - P))
        slots[1] = self.outside
        return slots

    @functools.cached_property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rng = np.random.default_rng(0)
        B, T, S, (N, K) = self.batch, self.tokens, self.slots, self.heads

        def draw(*shape, dtype=self.dtype):
            x = rng.normal(size=shape)
            # What elu is given has gone through a positive feature map.
            return jnp.asarray(abs(x) if "elu(n" in self.normalizer else x, dtype)

        H, V, kept = self.head_dim, self.value_dim, self.cache_dtype or self.dtype
        key, value = draw(B, K, S, H, dtype=kept), draw(B, K, S, V, dtype=kept)
        options: dict[str, Any] = {
            "query_positions": jnp.asarray(self.clocks),
            "key_positions": jnp.asarray(self.key_positions),
            "num_sink_tokens": 0 if self.pinned else self.sink_slots,
            "num_sink_slots": self.sink_slots,
            "window": self.window,
            "normalizer": normalizers.resolve(self.normalizer),
            "scale": 0.4,
            "logits_soft_cap": self.soft_cap,
        }
        if self.sink_slots and self.sink_query:
            options["sink_query"] = draw(B, T, N, H)
        if self.sinks:
            shape = (B, T, N) if self.sinks == "token" else (N,)
            options["sinks"] = draw(*shape, dtype="float32")
        if self.learned:
            names = options["normalizer"].parameters
            options["normalizer_params"] = {
                name: jnp.linspace(0.1, 0.4 + n, N) for n, name in enumerate(names)
            }
        if self.is_int8:
            key, options["key_scale"] = int8.quantize(key)
            value, options["value_scale"] = int8.quantize(value)
        if not self.writes:
            return (draw(B, T, N, H), key, value), options
        options["slots"] = jnp.asarray(self.write_slots)
        return (draw(B, T, N, H), draw(B, T, K, H), draw(B, T, K, V), key, value), options

    def run(self, more: dict[str, Any]) -> tuple[reference.Step, reference.Step]:
        """Of the kernel, and of the specification, as one program."""
        args, options = self.arguments
        static = {n: options[n] for n in options if not isinstance(options[n], jax.Array | dict)}
        arrays = {n: x for n, x in options.items() if n not in static}

        @jax.jit
        def both(args, arrays):
            results = []
            for module, chosen in ((pallas_tpu, more), (reference, {})):
                run = module.decode_step if self.writes else module.decode_attention
                found = run(*args, **arrays, **static, **chosen)
                results.append(found if self.writes else reference.Step(*found, None, None))
            return results

        return both(args, arrays)

    def check(self, interpret: Any = True) -> None:
        more = {"chunk": self.chunk, "skip": self.skip, "interpret": interpret}
        got, want = self.run(more)
        assert np.abs(want.out).max() > 0.05
        kind = "bfloat16" if "bfloat16" in (self.dtype, self.cache_dtype) else "float32"
        for name, x, y in zip(got._fields, got, want, strict=True):
            if name == "lse" and y is None or name not in ("out", "lse") and not self.writes:
                assert x is None or not self.writes
            elif name in ("out", "lse"):
                assert x.dtype == y.dtype
                conformance.assert_close(name, x, y, kind)
            elif y is not None:  # the leaves: every slot, those that were not written included
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y, err_msg=name)


EVERY_FAMILY = (
    "softmax1", "softmax_n(n=2.0)", "sigsoftmax", "cog", "sigmoid(bias=-1.0)",
    "sigmoid(normalized=True)", "relu(divisor=2.0)", "relu(by_length=True)",
    "relu(normalized=True)", "elu", "elu(normalized=True)", "identity", "identity(normalized=True)",
    "consmax", "softpick", "rectified_only", "relu_softmax",
)  # fmt: skip
PROBLEMS = [
    Problem(
        tokens=3,
        pinned=True,
        sinks="token",
        soft_cap=2.0,
        dtype="bfloat16",
        writes=False,
        chunk=256,
        head_dim=128,
    ),
]
SLOW = [
    # Two chunks, the second one cut, one of them empty for some rows and passed over.
    Problem(is_int8=True, per_head=True, skip=True),
    Problem(is_int8=True, per_head=True, skip=True, head_dim=128, value_dim=256),
    Problem(),
    Problem(head_dim=128, value_dim=128),
    Problem(head_dim=128, value_dim=128, dtype="bfloat16", slots=300, outside=300),
    Problem(head_dim=256, value_dim=128, chunk=256, skip=True),
    Problem(outside=131, skip=True),
    Problem(chunk=256),  # one chunk, larger than the cache
    Problem(slots=256, chunk=256, sinks=None),
    Problem(slots=300, sink_slots=0, window=None, batch=4),
    Problem(slots=300, sink_slots=290, chunk=128, skip=True),  # sink slots in several chunks
    Problem(slots=523, window=50, skip=True, sinks=None, batch=4),  # chunks that left the window
    Problem(heads=(8, 8), head_dim=64, value_dim=80, per_head=True, skip=True),
    Problem(heads=(16, 16), head_dim=8, value_dim=8, per_head=True, skip=True, is_int8=True),
    Problem(heads=(20, 2), is_int8=True, chunk=256, soft_cap=1.5),
    Problem(slots=523, window=50, skip=True, pinned=True, is_int8=True),
    Problem(slots=523, window=50, skip=True, pinned=True, sink_query=False),
    Problem(sink_query=False),
    Problem(dtype="bfloat16", is_int8=True),
    Problem(dtype="bfloat16", head_dim=80, value_dim=80),
    Problem(dtype="float32", cache_dtype="bfloat16"),
    Problem(dtype="bfloat16", cache_dtype="float32"),
    Problem(tokens=16, heads=(4, 2), writes=False, slots=300),
    Problem(tokens=2, sinks="head", writes=False, is_int8=True, per_head=True),
    Problem(tokens=3, normalizer="softpick", sinks=None, writes=False),
    Problem(normalizer="sigmoid", learned=True, sinks=None),
    Problem(normalizer="consmax", learned=True, sinks=None, tokens=3, writes=False),
    *(Problem(normalizer=name, sinks=None, slots=300) for name in EVERY_FAMILY),
]


def name_of(problem: Problem) -> str:
    """What is not as usual."""
    usual = Problem()
    changed = {
        n: x for n, x in dataclasses.asdict(problem).items() if x != getattr(usual, n)
    }  # fmt: skip
    return "-".join(f"{n}={x}" for n, x in changed.items()) or "usual"


@pytest.mark.parametrize(
    "problem", [*PROBLEMS, *(pytest.param(p, marks=pytest.mark.slow) for p in SLOW)], ids=name_of
)
def test_is_the_reference(problem):
    problem.check()


TINY = Problem(heads=(2, 2), head_dim=8, value_dim=128, batch=2)


@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(TINY, slots=256, is_int8=True, per_head=True, skip=True),
        # JAX's interpreter cannot alias a leaf that ends within a block.
        pytest.param(dataclasses.replace(TINY, writes=False), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_no_races_and_nothing_uninitialised(problem, capfd):
    """Memory starts as NaN, a read out of bounds raises, and a race is printed."""
    problem.check(pltpu.InterpretParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def test_two_halves_of_a_ring_merge_by_log_sum_exp():
    """A ring split over devices: the sink logit counts in one half, weights are e^(lse − total)."""
    whole = Problem(heads=(2, 1), writes=False, sink_slots=0, slots=256)
    (query, key, value), options = whole.arguments

    def attend(half, sinks):
        cut = {**options, "key_positions": options["key_positions"][:, :, half], "sinks": sinks}
        return pallas_tpu.decode_attention(
            query, key[:, :, half], value[:, :, half], **cut, interpret=True
        )

    @jax.jit
    def run():
        parts = [attend(slice(0, 128), options["sinks"]), attend(slice(128, 256), None)]
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        total = jax.nn.logsumexp(lses, axis=0)
        merged = (outs * jnp.exp(lses - total)[..., None]).sum(axis=0)
        whole = reference.decode_attention(query, key, value, **options)
        return (merged, total), whole, lses

    (merged, total), (out, lse), lses = run()
    assert np.isinf(lses[1]).any() and np.isfinite(lses[1]).any()  # a half that nobody sees, too
    conformance.assert_close("out", merged, out, "float32")
    conformance.assert_close("lse", total, lse, "float32")


def test_empty_chunks_are_not_read():
    """NaN in every slot of a chunk without a visible key goes unnoticed."""
    problem = Problem(heads=(2, 1), slots=600, window=50, skip=True, writes=False, batch=1)
    (query, key, value), options = problem.arguments
    seen = np.asarray(reference.visible(
        options["query_positions"], options["key_positions"], num_sink_tokens=5, window=50,
    ))[0, 0, 0]  # fmt: skip
    chunks = np.add.reduceat(seen, range(0, 600, 128))
    assert (chunks == 0).sum() == 3 and chunks[0] and chunks[3]  # sink tokens, and the window
    poison = jnp.asarray(np.where(np.repeat(chunks == 0, 128)[:600], np.nan, 0.0)[:, None])
    want, _ = jax.jit(lambda: reference.decode_attention(query, key, value, **options))()
    more = {"chunk": 128, "skip": True, "interpret": True}
    bad = key + poison, value + poison
    got, _ = jax.jit(lambda: pallas_tpu.decode_attention(query, *bad, **options, **more))()
    conformance.assert_close("out", got, want, "float32")


@pytest.mark.slow
def test_derivatives_are_those_of_the_specification():
    """Of attention and of a step; there is no kernel for them."""
    for problem in (Problem(writes=False), Problem(is_int8=True)):
        args, options = problem.arguments

        def slopes(module, args=args, options=options, writes=problem.writes, **more):
            run = module.decode_step if writes else module.decode_attention

            def loss(query, sinks):
                results = run(query, *args[1:], **{**options, "sinks": sinks}, **more)
                return (results[0] ** 2).sum() + jnp.cos(results[1]).sum()

            return jax.jit(jax.value_and_grad(loss, (0, 1)))(args[0], options["sinks"])

        (got, grads), (want, wanted) = slopes(pallas_tpu, interpret=True), slopes(reference)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for x, y in zip(grads, wanted, strict=True):
            np.testing.assert_array_equal(x, y)


def test_visits():
    ring = tpu_ring.Ring(
        normalizer=normalizers.Softmax(), scale=1.0, soft_cap=None, window=None, sink_tokens=0,
        sink_slots=0, tokens=1, slots=11, chunk=2, heads=1, all_heads=1, skips=True,
    )  # fmt: skip
    seen = np.zeros((3, 1, 11), bool)
    seen[0, 0, [3, 8]] = seen[1, 0, 10] = True
    order = jax.jit(functools.partial(tpu_ring.visits, ring=ring))
    none = jnp.asarray(seen), None
    assert order(*none).tolist() == [1, 1, 4, 4, 4, 4] + [5] * 6 + [0] * 6
    slots = jnp.array([0, -1, 11])
    assert order(none[0], slots).tolist() == [0, 1, 4, 4, 4, 4] + [5] * 6 + [0] * 6


def test_nothing_of_the_size_of_the_cache_is_made():
    """Outside the kernel, and in it two leaves that alias the operands."""
    problem = Problem(slots=1024, head_dim=128, value_dim=256)
    args, options = problem.arguments
    static = {n: options.pop(n) for n in list(options) if not isinstance(options[n], jax.Array)}

    def run(args, options):
        return pallas_tpu.decode_step(*args, **options, **static)

    outer = jax.make_jaxpr(run)(args, options).jaxpr.eqns
    equations = [e for e in outer if e.primitive.name != "custom_jvp_call"]
    for equation in outer:
        if equation.primitive.name == "custom_jvp_call":
            equations += equation.params["call_jaxpr"].jaxpr.eqns
    calls = [e for e in equations if e.primitive.name == "pallas_call"]
    assert len(calls) == 1
    large = [v for e in equations if e is not calls[0] for v in e.outvars if v.aval.ndim > 3]
    assert max((v.aval.size for v in large), default=0) < args[3].size / 100
    aliases = dict(calls[0].params["input_output_aliases"])
    assert len(aliases) == 2
    for source, target in aliases.items():
        assert calls[0].invars[source].aval.shape == calls[0].outvars[target].aval.shape


def test_what_is_not_served_says_why():
    problem = Problem(slots=200, writes=False, sink_slots=0)
    (query, key, value), options = problem.arguments
    options = {**options, "interpret": True}

    def refuse(error, match, q=query, k=key, v=value, **more):
        more = {**options, **more}
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
            (q, k, v, more),
        )
        for *operands, given in ((q, k, v, more), shapes):
            with pytest.raises(error, match=match):
                pallas_tpu.check(*operands, **given)

    def zeros(*shape, dtype="float32"):
        return jnp.zeros(shape, dtype)

    no = NotImplementedError
    refuse(no, "several passes", normalizer=normalizers.Sparsemax(), sinks=None)
    refuse(no, "several passes", normalizer=normalizers.StickBreaking(), sinks=None)
    refuse(no, "bias", bias=zeros(1, 6, 1, 200))
    refuse(no, "mask", mask=zeros(3, 1, 1, 200, dtype=bool))
    refuse(no, "float16", q=query.astype("float16"))
    refuse(no, "bfloat16", v=value.astype("bfloat16"))
    refuse(no, "head size.*257", q=zeros(3, 1, 6, 257), k=zeros(3, 2, 200, 257))
    refuse(no, "rows", q=zeros(3, 50, 6, 16), query_positions=None)
    refuse(no, "128 slots, got 97", k=key[:, :, :97], v=value[:, :, :97], interpret=False,
           key_positions=options["key_positions"][..., :97])  # fmt: skip
    refuse(ValueError, r"\[3, 2, 200, 16\], \[3, 2, 199, 24\]", v=value[:, :, :199])
    refuse(ValueError, r"\[3, 1, 199\]", key_positions=options["key_positions"][..., :199])
    refuse(ValueError, "neither", key_scale=zeros(3, 2, 200), value_scale=zeros(3, 2, 200))
    refuse(ValueError, "multiple of 128, got 100", chunk=100)
    pallas_tpu.check(query, key, value, **options)
    with pytest.raises(no, match="bias"):
        pallas_tpu.decode_attention(query, key, value, bias=zeros(1, 6, 1, 200), **options)


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES: dict[str, dict[str, Any]] = {
    "ring": {"C": 1024},
    "long": {"C": 65536, "B": 1, "skip": True, "window": 4096},
    "cut": {"C": 1032},
    "int8": {"C": 1056, "dtype": "int8"},
    "float32": {"C": 4096, "dtype": "float32", "sinks": 3, "soft_cap": 30.0},
    "64": {"C": 520, "N": 64, "H": 64},
    "80 per head": {"C": 1024, "H": 80, "per_head": True, "N": 8, "normalizer": "softpick"},
    "96": {"C": 4096, "H": 96, "N": 12, "K": 12, "normalizer": "sigmoid"},
    "192": {"C": 2048, "H": 192, "Hv": 128, "N": 16, "K": 16, "dtype": "int8"},
    "256": {"C": 2048, "H": 256, "K": 1, "N": 8},
    "several tokens": {"C": 4096, "T": 16, "sinks": 3},
}


def shapes(
    place, C, B=4, T=1, N=32, K=8, H=128, Hv=None, dtype="bfloat16", per_head=False, sinks=1
):
    """Leaves, and the other operands of a step, or of attention where T > 1."""

    def of(*sizes, dtype=dtype if dtype != "int8" else "bfloat16"):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    Hv = Hv or H
    leaves = {"key": of(B, K, C, H, dtype=dtype), "value": of(B, K, C, Hv, dtype=dtype)}
    if dtype == "int8":
        leaves |= {f"{n}_scale": of(B, K, C, dtype="float32") for n in ("key", "value")}
    rest = {
        "query": of(B, T, N, H),
        "sink_query": of(B, T, N, H),
        "query_positions": of(B, T, dtype="int32"),
        "key_positions": of(B, K if per_head else 1, C, dtype="int32"),
        "sinks": of(*((B, T, N) if sinks == 3 else (N,)), dtype="float32"),
    }
    if T == 1:
        rest |= {"new_key": of(B, T, K, H), "new_value": of(B, T, K, Hv)}
        rest["slots"] = of(B, dtype="int32")
    return leaves, rest


def program(normalizer="softmax", window=None, soft_cap=None, skip=None):
    described = normalizers.resolve(normalizer)

    def run(leaves, rest):
        if not described.takes_sinks:
            rest = {n: x for n, x in rest.items() if n != "sinks"}
        call = pallas_tpu.decode_step if "slots" in rest else pallas_tpu.decode_attention
        return call(
            **leaves, **rest, num_sink_slots=4, num_sink_tokens=4, window=window,
            normalizer=described, scale=0.1, logits_soft_cap=soft_cap, skip=skip,
        )  # fmt: skip

    return jax.jit(run, donate_argnums=0)


@pytest.mark.tpu_aot
@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_and_updates_in_place(chip, name, monkeypatch):
    """Ahead of time: leaves alias, and nothing of their size is copied, moved or kept beside them."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    options = dict(SHAPES[name])
    static = {
        n: options.pop(n) for n in ("normalizer", "window", "soft_cap", "skip") if n in options
    }
    leaves, rest = shapes(place, **options)
    compiled = program(**static).lower(leaves, rest).compile()
    memory = compiled.memory_analysis()
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves.values())
    assert memory.temp_size_in_bytes < size / 20
    if "slots" in rest:
        assert memory.alias_size_in_bytes >= size
    text = compiled.as_text()
    made = re.findall(r" = \(?(\w+\[[\d,]*\])\S* (\S+?)\(", text[text.index("ENTRY") :])
    large = {f"{re.sub('bfloat', 'bf', str(x.dtype))}{list(x.shape)}" for x in leaves.values()}
    large = {re.sub(r"int(\d)", r"s\1", re.sub(r"float", "f", x)).replace(" ", "") for x in large}
    moved = {op for shape, op in made if shape in large}
    assert moved <= {"parameter", "get-tuple-element", "bitcast", "tuple", "custom-call"}
    assert "parameter" in moved


@pytest.mark.tpu_aot
def test_compiles_inside_shard_map(monkeypatch):
    """Rows over one axis and heads over the other, under `check_vma=True`."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
    leaves, rest = shapes(None, 1024, K=16, N=32)
    leaf, token, row = P("data", "model"), P("data", None, "model"), P("data")
    specs = (
        {name: leaf for name in leaves},
        {
            "query": token, "sink_query": token, "new_key": token, "new_value": token,
            "query_positions": row, "key_positions": row, "slots": row, "sinks": P("model"),
        },
    )  # fmt: skip
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        (leaves, rest),
        specs,
    )
    out = reference.Step(token, token, leaf, leaf)
    split = jax.shard_map(program(), mesh=mesh, in_specs=specs, out_specs=out, check_vma=True)
    jax.jit(split).lower(*placed).compile()
