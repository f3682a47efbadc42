"""Measured times of attention on the device that is there.

Nothing is timed that does not compute what it says: outputs and gradients of some queries are first
compared with `flash.reference` in float32. Times are medians of repetitions that are interleaved, so that
a change of clock meets all contestants alike.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax_kernels import cases as cases_module
from sinkjax_kernels.bench import chips, decoding
from sinkjax_kernels.bench.contestants import (
    NAMES,
    CannotRun,
    Contestant,
    arrays,
    contestant,
    static,
    visibility,
)
from sinkjax_kernels.bench.table import format_table, write_lines
from sinkjax_kernels.cases import Case
from sinkjax_kernels.flash import reference

SEED = 0
CHECKED = 48  # queries whose output and gradients are compared
TOLERANCE = 2e-2  # relative root mean square, of bfloat16 gradients
SHORTEST = 0.05  # seconds of one repetition: faster calls are repeated


@dataclasses.dataclass(frozen=True)
class Measured:
    """One pass of one contestant.

    Args:
        seconds: of a call; None where `error` says what is wrong.
        deviation: from the reference, relative root mean square.
    """

    name: str
    which: str
    is_ours: bool
    seconds: float | None = None
    causal_seconds: float | None = None
    deviation: float | None = None
    error: str = ""


def run(options: argparse.Namespace) -> int:
    """The command `bench time`."""
    for name in options.implementation or ():
        if name not in NAMES:
            print(f"implementation: expected some of {', '.join(NAMES)}, got {name!r}")
            return 2
    start = time.perf_counter()
    device = jax.devices()[0]
    rates = chips.limits(device.device_kind)
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}, bfloat16, seed {SEED}")
    lines, failed = [], False
    for name in options.case:
        case = _adapted(cases_module.case(name), options)
        found = measure(case, options, device.platform)
        failed |= any(
            m.error and (options.implementation or "skipped" not in m.error) for m in found
        )
        rows = [_row(case, m, found, options.batch, rates) for m in found if m.seconds]
        print(f"\n{_title(case, options.batch)}")
        if rows:
            print(format_table(list(_HEADINGS.values()), [[r[k] for k in _HEADINGS] for r in rows]))
        for m in found:
            if m.error:
                print(f"{m.name} {m.which}".rstrip() + f": {m.error}")
        more, said = decoding.measure(case, options, device.platform, rates, medians)
        if more:
            print(
                format_table(
                    list(decoding.HEADINGS.values()),
                    [[r[k] for k in decoding.HEADINGS] for r in more],
                )
            )
        for line in said:
            print(line)
        common = _common(device, time.perf_counter() - start)
        lines += [row | common for row in [*rows, *more]]
    if options.json:
        write_lines(options.json, lines)
    return int(failed)


_HEADINGS = {
    "implementation": "by",
    "pass": "pass",
    "milliseconds": "time (ms)",
    "tflops": "TFLOP/s",
    "roofline_share": "of roofline (%)",
    "times_jax_nn": "× jax.nn",
    "times_jax_nn_cudnn": "× jax.nn cudnn",
    "times_splash": "× splash",
    "times_causal": "× own causal",
    "deviation": "deviation",
}


def _adapted(case: Case, options: argparse.Namespace) -> Case:
    length, heads = options.length or case.length, options.heads or case.num_heads
    kv_heads = case.num_kv_heads if heads % case.num_kv_heads == 0 else heads
    return dataclasses.replace(case, length=length, num_heads=heads, num_kv_heads=kv_heads)


def _title(case: Case, batch: int) -> str:
    mask = "causal" if case.window is None else f"window {case.window}"
    if case.num_sink_tokens:
        mask += f", {case.num_sink_tokens} sink tokens"
    logits = ", sink logits" if case.has_sinks else ""
    return (
        f"{case.name}: B={batch} T={case.length} N={case.num_heads} K={case.num_kv_heads} "
        f"H={case.head_dim}, {mask}{logits} (× is how many times as fast)"
    )


def _common(device, seconds: float) -> dict[str, Any]:
    memory = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "seed": SEED,
        "seconds": round(seconds, 1),
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def _row(case: Case, m: Measured, found: Sequence[Measured], batch: int, rates) -> dict[str, Any]:
    assert m.seconds is not None
    seconds = m.seconds
    pairs = case.ranges.pairs(case.length) * case.num_heads * batch
    matmuls = 2 if m.which == "forward" else 7
    flops = 2 * matmuls * pairs * case.head_dim
    kept = case.num_heads + case.num_kv_heads  # q and out, k and v; again their gradients
    moved = 2 * 2 * batch * case.length * case.head_dim * kept
    moved *= 1 if m.which == "forward" else 3
    share = None
    if rates.peak and rates.bandwidth:
        share = max(flops / rates.peak, moved / rates.bandwidth) / seconds * 100

    def times(name):
        other = next((o.seconds for o in found if (o.name, o.which) == (name, m.which)), None)
        return other and other / seconds

    return {
        "case": case.name,
        "implementation": m.name,
        "pass": m.which,
        "length": case.length,
        "batch": batch,
        "milliseconds": seconds * 1e3,
        "tflops": flops / seconds / 1e12,
        "roofline_share": share,
        "times_jax_nn": times("jax.nn"),
        "times_jax_nn_cudnn": times("jax.nn cudnn"),
        "times_splash": times("splash"),
        "times_causal": m.causal_seconds and m.causal_seconds / seconds,
        "deviation": m.deviation,
    }


def measure(case: Case, options: argparse.Namespace, platform: str) -> list[Measured]:
    """Both passes of all contestants of a case, and of ours on the plain causal mask too."""
    operands = arrays(case, options.batch, SEED)
    rng = np.random.default_rng(SEED + 1)
    d_out = jnp.asarray(rng.standard_normal(operands[0].shape, np.float32), jnp.bfloat16)
    rows = _some_rows(case)
    calls: dict[tuple[str, str, bool], Callable[[], Any]] = {}
    found: dict[tuple[str, str], Measured] = {}
    most = options.limit * 2**30
    for name in options.implementation or NAMES:
        try:
            one = contestant(name, case, platform, options.batch, most)
        except CannotRun as error:
            found[name, ""] = Measured(name, "", False, error=f"skipped: {error}")
            continue
        for which, (told, call) in _checked(one, operands, d_out, rows).items():
            found[name, which] = told
            if call is not None:
                calls[name, which, False] = functools.partial(call, *operands, d_out)
        if one.is_ours and case.window is not None:
            plain = dataclasses.replace(case, window=None, num_sink_tokens=0)
            causal = contestant(name, plain, platform, options.batch, most)
            for which, (_, call) in _checked(causal, operands, d_out, rows).items():
                if call is not None and (name, which, False) in calls:
                    calls[name, which, True] = functools.partial(call, *operands, d_out)
    for (name, which, is_causal), seconds in medians(calls, options.repetitions).items():
        value = {"causal_seconds" if is_causal else "seconds": seconds}
        found[name, which] = dataclasses.replace(found[name, which], **value)
    return list(found.values())


def _compiled(one: Contestant, which: str) -> Callable:
    """`(query, key, value, sinks, d_out)` → out, or out and the gradients."""

    @jax.jit
    def forward(query, key, value, sinks, d_out):
        return one.attend(query, key, value, sinks)

    @jax.jit
    def both(query, key, value, sinks, d_out):
        out, back = jax.vjp(one.attend, query, key, value, sinks)
        return out, back(d_out)

    return forward if which == "forward" else both


def _some_rows(case: Case) -> np.ndarray:
    """The first queries, the last, and some between."""
    rng = np.random.default_rng(SEED)
    most = min(CHECKED, case.length)
    ends = [*range(min(8, case.length)), *range(max(0, case.length - 8), case.length)]
    return np.unique([*ends, *rng.choice(case.length, most, replace=False)])


def _checked(
    one: Contestant, operands, d_out, rows: np.ndarray
) -> dict[str, tuple[Measured, Callable | None]]:
    """Runs both passes once and compares the outputs and gradients that belong to some queries."""
    d_some = jnp.zeros_like(d_out).at[:, rows].set(d_out[:, rows])
    want = _expected(one, operands, d_some, rows)
    results: dict[str, tuple[Measured, Callable | None]] = {}
    for which in ("forward", "forward+backward"):
        call = _compiled(one, which)
        told = Measured(one.name, which, one.is_ours)
        try:
            got = jax.block_until_ready(call(*operands, d_some))
        except Exception as error:  # whatever a compiler says; the other contestants go on
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            results[which] = (dataclasses.replace(told, error=reason), None)
            continue
        out, grads = got if which != "forward" else (got, ())
        parts = dict(zip(("dq", "dk", "dv", "d_sinks"), grads, strict=False)) | {"out": out}
        for name in ("out", "dq"):
            if name in parts:
                parts[name] = parts[name][:, rows]
        deviations = {name: _deviation(x, want[name]) for name, x in parts.items()}
        deviation = max(deviations.values())
        if deviation <= TOLERANCE:
            results[which] = (dataclasses.replace(told, deviation=deviation), call)
        else:
            worst = ", ".join(f"{name} {x:.1e}" for name, x in deviations.items())
            reason = f"wrong, not timed: deviates from the reference by {worst}"
            results[which] = (dataclasses.replace(told, error=reason), None)
    return results


def _expected(one: Contestant, operands, d_out, rows: np.ndarray) -> dict[str, Any]:
    """The same of the reference in float32, for these queries alone: no array of all scores.

    Where the cotangent is 0 at the other queries, the gradients of keys and values are whole.
    """
    case = one.case

    @jax.jit
    def run(query, key, value, sinks, d_out):
        def attend(query, key, value, sinks):
            return reference.attention(
                query, key, value, None, None, visibility(case, rows),
                sinks if case.has_sinks else None, **static(case),
            )[0]  # fmt: skip

        out, back = jax.vjp(attend, query, key, value, sinks)
        return out, *back(d_out)

    query, *others = (x.astype(jnp.float32) for x in operands)
    results = run(query[:, rows], *others, d_out[:, rows].astype(jnp.float32))
    return dict(zip(("out", "dq", "dk", "dv", "d_sinks"), results, strict=True))


def _deviation(got, want) -> float:
    got, want = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, want))
    scale = np.sqrt((want**2).mean())
    return float(np.sqrt(((got - want) ** 2).mean()) / (scale if scale else 1.0))


def medians(calls: dict[Any, Callable[[], Any]], repetitions: int) -> dict[Any, float]:
    """Seconds of each call; a repetition goes through all of them."""
    often = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
        often[name] = max(1, min(1000, int(SHORTEST / once)))
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(often[name]):
                result = call()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / often[name])
    return {name: statistics.median(x) for name, x in seconds.items()}
