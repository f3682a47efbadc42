"""What `bench time` measures: our implementations by name, and what else computes attention."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.cases import Case

MODULES = {  # name: the platform that it is for, None is any
    "xla": None,
    "rows": None,
    "reference": None,
    "pallas_tpu": "tpu",
    "pallas_gpu": "gpu",
    "cudnn": "gpu",
}
DECODE_MODULES = {"reference": None, "pallas_tpu": "tpu", "pallas_gpu": "gpu"}
BASELINES = {"jax.nn": None, "jax.nn cudnn": "gpu", "splash": "tpu"}
NAMES = [*MODULES, *BASELINES]
_DENSE = ("reference", "jax.nn")  # hold all scores at a time


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Something that computes the attention of a case, or the nearest to it that it can.

    Args:
        attend: (query, key, value, sinks) → out, `[B, T, N, H]`.
        case: what it computes, which may lack sink logits or sink tokens.
        is_ours: an implementation of this package.
    """

    name: str
    attend: Callable[..., Any]
    case: Case
    is_ours: bool


class CannotRun(Exception):
    """A contestant that this device, or this length, is nothing for; with the reason."""


def contestant(name: str, case: Case, platform: str, batch: int, most_scores: float) -> Contestant:
    """The contestant of that name for a case.

    Args:
        most_scores: largest dense array of scores, in bytes.

    Raises:
        CannotRun: it is for another platform or takes too much memory.
        ValueError: nothing has that name.
    """
    if name not in NAMES:
        raise ValueError(f"implementation: expected some of {', '.join(NAMES)}, got {name!r}")
    needs = (MODULES | BASELINES)[name]
    if needs not in (None, platform):
        raise CannotRun(f"needs a {needs}, this is a {platform}")
    scores = 4 * batch * case.num_heads * case.length**2
    if name in _DENSE and scores > most_scores:
        raise CannotRun(
            f"its scores take {scores / 2**30:.0f} GiB, the limit is {most_scores / 2**30:.3g}"
        )
    if name == "jax.nn":
        case = dataclasses.replace(case, has_sinks=False)
        return Contestant(name, functools.partial(_jax_nn, case), case, False)
    if name == "jax.nn cudnn":
        case = dataclasses.replace(case, has_sinks=False, num_sink_tokens=0)
        return Contestant(name, functools.partial(_jax_nn_cudnn, case), case, False)
    if name == "splash":
        return Contestant(name, _splash(case), case, False)
    module = importlib.import_module(f"sinkjax_kernels.flash.{name}")
    return Contestant(name, functools.partial(_ours, module.attention, case), case, True)


def visibility(case: Case, query_positions=None) -> masks.Visibility:
    queries = case.length if query_positions is None else len(query_positions)
    return masks.build(
        (1, queries, case.length, 1),
        is_causal=True,
        local_window_size=None if case.window is None else (case.window - 1, 0),
        num_sink_tokens=case.num_sink_tokens,
        query_positions=query_positions,
    )


def static(case: Case) -> dict[str, Any]:
    return {
        "normalizer": normalizers.Softmax(),
        "scale": case.head_dim**-0.5,
        "logits_soft_cap": None,
    }


def _ours(attention, case, query, key, value, sinks):
    sinks = sinks if case.has_sinks else None
    return attention(query, key, value, None, None, visibility(case), sinks, **static(case))[0]


def _jax_nn(case, query, key, value, sinks):
    mask = None
    if case.window is not None:
        mask = visibility(case).visible()
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=mask is None, implementation="xla"
    )


def _jax_nn_cudnn(case, query, key, value, sinks):
    window = None if case.window is None else (case.window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def _splash(case: Case):
    from sinkjax_kernels.bench import splash
    from sinkjax_kernels.bench.splash_blocks import sizes_for

    if case.length > splash.LONGEST:
        raise CannotRun(f"its mask of more than {splash.LONGEST} tokens takes minutes to prepare")
    kind = jax.devices()[0].device_kind
    sizes = sizes_for(_chip_of(kind), case)
    sizes = {k: (min(q, case.length), min(s, case.length)) for k, (q, s) in sizes.items()}
    attend, _ = splash.build(case, sizes)

    def call(query, key, value, sinks):
        query = query * jnp.asarray(case.head_dim**-0.5, query.dtype)  # it scales nothing itself
        heads = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.vmap(attend, in_axes=(0, 0, 0, None))(*heads, sinks).swapaxes(1, 2)

    return call


def _chip_of(kind: str) -> str:
    from sinkjax_kernels.bench.chips import TPUS

    for chip in sorted(TPUS, key=lambda c: -len(c.kind)):
        if kind.startswith(chip.kind):
            return chip.name
    return "v5e"


def arrays(case: Case, batch: int, seed: int) -> tuple[Any, ...]:
    """query, key, value, sinks in the case's types."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    T, H = case.length, case.head_dim
    heads = [draw(batch, T, n, H) for n in (case.num_heads, case.num_kv_heads, case.num_kv_heads)]
    return (*heads, jnp.asarray(rng.standard_normal(case.num_heads), jnp.float32))
