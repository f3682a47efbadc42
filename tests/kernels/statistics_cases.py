"""Attention statistics over ranges, for every kernel of them: cases and the oracle in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax._compat import enable_x64
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import reference as flash
from sinkjax_kernels.statistics import reference


@dataclasses.dataclass(frozen=True)
class Problem:
    """Queries and keys of which each sees itself; sizes are pairwise distinct.

    Args:
        offset: of the first query, in keys.
        segments: lengths of packed documents, or None.
        sinks: a logit per `head`, per `token` and head, or None.
    """

    T: int
    window: int | None = None
    sink_tokens: int = 0
    offset: int = 0
    more_keys: int = 0
    segments: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    soft_cap: float | None = None
    normalizer: str = "softmax"
    sinks: str | None = "head"
    dtype: str = "float32"
    batch: int = 1
    scale: float = 0.3

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.default != getattr(self, f.name)
        ]
        return "-".join(changed).replace(" ", "")

    @property
    def S(self) -> int:
        return self.offset + self.T + self.more_keys

    @functools.cached_property
    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.T)
        (N, K), B = self.heads, self.batch

        def draw(*shape):
            return np.asarray(jnp.asarray(rng.normal(size=shape), self.dtype))

        operands = {
            "query": draw(B, self.T, N, self.head_dim) * 2,
            "key": draw(B, self.S, K, self.head_dim),
        }
        if self.sinks is not None:
            shape = (N,) if self.sinks == "head" else (B, self.T, N)
            operands["sinks"] = (rng.normal(size=shape) + 2).astype(np.float32)
        return operands

    @property
    def static(self) -> dict:
        return {
            "normalizer": normalizers.resolve(self.normalizer),
            "scale": self.scale,
            "logits_soft_cap": self.soft_cap,
        }

    def visibility(self) -> masks.Visibility:
        places = {}
        if self.segments is not None:
            ids = np.repeat(np.arange(len(self.segments)), self.segments).astype(np.int32)
            # One array, in each batch row shifted by some tokens.
            ids = jnp.asarray(np.stack([np.sort(np.roll(ids, 29 * b)) for b in range(self.batch)]))
            places = {"query_segment_ids": ids, "key_segment_ids": ids}
        elif self.offset:
            places = {"query_positions": np.arange(self.T) + self.offset}
        return masks.build(
            (self.batch, self.T, self.S, self.heads[1]),
            is_causal=True,
            local_window_size=None if self.window is None else (self.window - 1, 0),
            num_sink_tokens=self.sink_tokens,
            **places,
        )

    def oracle(self, folds: bool) -> tuple[np.ndarray, reference.AttentionStatistics]:
        """The log-sum-exp and the statistics, in float64; `folds`: queries are rounded after the scale."""
        static = self.static
        with enable_x64():
            wide = {name: jnp.asarray(x, "float64") for name, x in self.operands.items()}
            if folds and self.dtype == "bfloat16":
                fold = self.scale * np.log2(np.e) if self.soft_cap is None else (
                    self.scale / self.soft_cap
                )  # fmt: skip
                rounded = (jnp.asarray(self.operands["query"], "float32") * fold).astype("bfloat16")
                wide["query"] = rounded.astype("float64")
                static["scale"] = self.scale / fold
            call = (wide["query"], wide["key"], None, None, self.visibility(), wide.get("sinks"))

            @jax.jit
            def run(*call):
                _, lse = flash.attention_weights(*call, **static)
                return lse, reference.attention_statistics(*call, **static)

            lse, want = run(*call)
            return np.asarray(lse, np.float32), jax.tree.map(np.asarray, want)

    def call(self, lse) -> tuple:
        """The arguments of a kernel."""
        x = {name: jnp.asarray(x) for name, x in self.operands.items()}
        return (
            x["query"],
            x["key"],
            None,
            None,
            self.visibility(),
            x.get("sinks"),
            jnp.asarray(lse),
        )

    def check(self, attention_statistics, folds: bool, **options) -> None:
        """All statistics of a kernel are those of the oracle."""
        lse, want = self.oracle(folds)
        run = jax.jit(lambda *call: attention_statistics(*call, **self.static, **options))
        got = run(*self.call(lse))
        for name, x in got._asdict().items():
            assert x.dtype == jnp.float32
            np.testing.assert_allclose(
                x, getattr(want, name), rtol=2e-5, atol=2e-5, err_msg=f"{self}: {name}"
            )


SOME = [  # the first of these runs by default
    Problem(523, sinks=None, heads=(3, 1), batch=2, dtype="bfloat16"),
    Problem(701, window=200, sink_tokens=5, more_keys=9, soft_cap=2.0),
    Problem(523, normalizer="softmax1", sinks=None),
    Problem(603, window=120, sink_tokens=5, segments=(100, 7, 300, 196), sinks=None, batch=2),
    Problem(301, window=150, sink_tokens=130, offset=407),
    Problem(301, offset=407, more_keys=50),
    Problem(603, segments=(100, 7, 300, 196), normalizer="softmax_n(n=2.5)", sinks=None),
    Problem(603, window=60, sink_tokens=140, segments=(350, 3, 250)),
    Problem(900, window=1, sink_tokens=3, sinks=None),
    Problem(601, window=129, sink_tokens=17, heads=(3, 1), dtype="bfloat16", batch=2),
    Problem(640, window=256, heads=(2, 2), sinks="token"),
    Problem(700, window=300, sink_tokens=20, heads=(4, 1), head_dim=80, soft_cap=3.0),
    Problem(131, window=40, sink_tokens=4, head_dim=256, scale=0.05),
    Problem(385, window=128, head_dim=192, scale=0.07, segments=(1, 383, 1)),
    Problem(257, window=500, sink_tokens=4),
]

REFUSED = {
    "lse.*return_residual": {"lse": None},
    "softpick": {"normalizer": normalizers.Softpick()},
    "normalizer": {"normalizer_params": {"n": jnp.zeros(4)}},
    "bias": {"bias": jnp.zeros((1, 1, 131, 131))},
    "mask": {"mask": jnp.ones((1, 1, 131, 131), bool)},
    "not causal": {"visibility": masks.build((1, 131, 131, 2))},
    "head size: at most 256": {"query": jnp.zeros((1, 131, 4, 257)), "key": jnp.zeros((1, 131, 2, 257))},
    "float16": {"query": jnp.zeros((1, 131, 4, 16), "float16")},
    "130 keys end before": {"key": jnp.zeros((1, 130, 2, 16))},
    "fewer than 128 queries": {"query": jnp.zeros((1, 127, 4, 16)), "lse": jnp.zeros((1, 127, 4))},
}  # fmt: skip
"""Reasons, and what of a legal call of 131 tokens to change for them."""

WRONG = {
    r"\[1, 131, 4, 16\] and \[1, 131, 3, 16\]": {"key": jnp.zeros((1, 131, 3, 16))},
    r"lse: expected \[1, 131, 4\], got \[1, 4, 131\]": {"lse": jnp.zeros((1, 4, 131))},
    r"sinks: expected \[4\]": {"sinks": jnp.zeros(2)},
}
"""Messages, and what to change for them, of shapes that do not go together."""


def changed(change: dict) -> tuple[tuple, dict]:
    """A legal call of 131 tokens with something changed."""
    problem = Problem(131)
    names = ("query", "key", "bias", "mask", "visibility", "sinks", "lse")
    call = dict(zip(names, problem.call(np.zeros((1, 131, 4), np.float32)), strict=True))
    static = problem.static
    for name, x in change.items():
        (call if name in call else static)[name] = x
    return tuple(call.values()), static


def check_refusals(module) -> None:
    """`check` and the call itself refuse, with the reason; a legal call passes."""
    call, static = changed({})
    module.check(*call, **static)
    for reason, change in REFUSED.items():
        call, static = changed(change)
        for run in (module.check, module.attention_statistics):
            with pytest.raises(NotImplementedError, match=reason):
                run(*call, **static)
    for message, change in WRONG.items():
        call, static = changed(change)
        with pytest.raises(ValueError, match=message):
            module.check(*call, **static)
