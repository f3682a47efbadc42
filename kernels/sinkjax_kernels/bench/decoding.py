"""Times of decoding: one token per sequence against a ring that is full."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import normalizers
from sinkjax_kernels.bench.contestants import DECODE_MODULES
from sinkjax_kernels.cases import Case

ROWS = 64  # sequences × key heads at least: fewer do not fill a chip
TOLERANCE = 1e-2
HEADINGS = {
    "implementation": "by",
    "pass": "pass",
    "batch": "B",
    "slots": "slots",
    "milliseconds": "time (ms)",
    "gigabytes_per_second": "GB/s",
    "bandwidth_share": "of HBM (%)",
    "deviation": "deviation",
}


def measure(
    case: Case, options: argparse.Namespace, platform: str, rates, medians: Callable
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the decode modules that run here, and why others do not."""
    batch = max(options.batch, -(-ROWS // case.num_kv_heads))
    slots = (
        case.length if case.window is None else min(case.length, case.window + case.num_sink_tokens)
    )
    operands = _operands(case, batch, slots)
    names = [n for n in DECODE_MODULES if n in (options.implementation or DECODE_MODULES)]
    calls, deviations, said = {}, {}, []
    want = None
    for name in names:
        needs = DECODE_MODULES[name]
        if needs not in (None, platform):
            said.append(f"{name} decode: skipped: needs a {needs}, this is a {platform}")
            continue
        try:
            module = importlib.import_module(f"sinkjax_kernels.decode.{name}")
            call = _call(module.decode_attention, case, operands)
            got = np.asarray(call().astype(jnp.float32))
        except Exception as error:  # whatever a compiler says; the others go on
            first = str(error).splitlines()[0] if str(error) else ""
            said.append(f"{name} decode: {type(error).__name__}: {first}")
            continue
        if want is None:
            want = _expected(case, operands)
        deviation = float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))
        if not deviation <= TOLERANCE:
            said.append(f"{name} decode: wrong, not timed: deviates by {deviation:.1e}")
            continue
        calls[name], deviations[name] = call, deviation
    moved = 2 * batch * slots * case.num_kv_heads * case.head_dim * 2
    rows = []
    for name, seconds in medians(calls, options.repetitions).items():
        speed = moved / seconds
        rows.append(
            {
                "case": case.name,
                "implementation": name,
                "pass": "decode",
                "batch": batch,
                "slots": slots,
                "milliseconds": seconds * 1e3,
                "gigabytes_per_second": speed / 1e9,
                "bandwidth_share": rates.bandwidth and speed / rates.bandwidth * 100,
                "deviation": deviations[name],
            }
        )
    return rows, said


def _operands(case: Case, batch: int, slots: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    K, H, P = case.num_kv_heads, case.head_dim, case.num_sink_tokens
    now = 3 * case.length
    recent = now - np.arange(slots - P)[::-1]
    # As a ring lies once it has gone round: the newest key is not the last.
    positions = np.concatenate([np.arange(P), np.roll(recent, slots // 3)]).astype(np.int32)
    return {
        "query": draw(batch, 1, case.num_heads, H),
        "key": draw(batch, K, slots, H),
        "value": draw(batch, K, slots, H),
        "query_positions": jnp.full((batch, 1), now, jnp.int32),
        "key_positions": jnp.asarray(np.broadcast_to(positions, (batch, 1, slots))),
        "sinks": jnp.asarray(rng.standard_normal(case.num_heads), jnp.float32),
    }


def _call(attend: Callable, case: Case, operands: dict[str, Any]) -> Callable[[], Any]:
    @jax.jit
    def run(operands):
        return attend(
            **operands,
            num_sink_tokens=case.num_sink_tokens,
            window=case.window,
            normalizer=normalizers.Softmax(),
            scale=case.head_dim**-0.5,
        )[0]

    if not case.has_sinks:
        operands = operands | {"sinks": None}
    return lambda: run(operands)


def _expected(case: Case, operands: dict[str, Any]) -> np.ndarray:
    from sinkjax_kernels.decode import reference

    wide = {
        name: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        for name, x in operands.items()
    }
    return np.asarray(_call(reference.decode_attention, case, wide)())
