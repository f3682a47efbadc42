"""A plan for people."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sinkjax.plan.report import Plan

_PARTS = ("parameters", "optimiser", "cache", "batch")
_FLOORS = {
    "arithmetic": "arithmetic at the peak",
    "memory": "memory at its bandwidth",
    "interconnect": "interconnect, all links",
    "exposed": "of these, beside no matrix product",
    "step": "the step, an optimistic estimate",
}


def tables(plan: Plan) -> Group:
    """What is printed: bytes, exchange, floors, and whether it fits."""
    parts: list[Any] = [Text(_title(plan), style="bold"), _bytes(plan)]
    if plan.collectives:
        parts.append(_exchange(plan))
    if plan.floors:
        parts.append(_time(plan))
    parts += [Text(f"note: {note}") for note in plan.notes]
    return Group(*parts, Text(verdict(plan), style="bold"))


def verdict(plan: Plan) -> str:
    """One or more lines: it fits, or it does not and what is largest."""
    total, hbm = plan.bytes_per_chip["total"], plan.hbm_bytes
    if plan.fits:
        return f"fits: {_gib(total)} of {_gib(hbm)} on each chip"
    lines = [f"does not fit: {_gib(total)} of {_gib(hbm)} on each chip; the largest buffers:"]
    for buffer in plan.buffers:
        source = f"  {buffer.source}" if buffer.source else ""
        lines.append(f"  {_gib(buffer.nbytes):>10}  {buffer.shapes}{source}")
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    job, model = plan.job, plan.job.run.model
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    chips = f"{plan.chips} chips"
    if plan.devices != plan.chips:
        chips += f", {plan.devices} devices"
    if job.ring is None:
        step = f"training step, {job.rows:,} rows of {model.context_length:,} tokens"
    else:
        slots = f"{job.ring.num_sink_tokens} + {job.ring.window:,}"
        step = f"decode step, {job.rows:,} streams on rings of {slots} tokens"
    return f"{step}, {job.topology} ({chips}), mesh {axes}"


def _bytes(plan: Plan) -> Table:
    table = _table("bytes per chip", ["", "bytes", "GiB"])
    for name, size in plan.bytes_per_chip.items():
        if name not in _PARTS:
            table.add_row(name, f"{size:,}", f"{size / 2**30:.3f}")
        if name == "arguments":
            for part in _PARTS:
                if part in plan.bytes_per_chip:
                    held = plan.bytes_per_chip[part]
                    table.add_row(f"  {part}", f"{held:,}", f"{held / 2**30:.3f}")
    table.add_row("HBM", f"{plan.hbm_bytes:,}", f"{plan.hbm_bytes / 2**30:.3f}")
    return table


def _exchange(plan: Plan) -> Table:
    heads = ["", "count", "GB sent", "async", "overlapped", "GB overlapped"]
    table = _table("collectives of one device in a step", heads)
    for kind, row in plan.collectives.items():
        table.add_row(
            kind,
            f"{row['count']:,}",
            f"{row['bytes'] / 1e9:.3f}",
            f"{row['asynchronous_count']:,}",
            f"{row['overlapped_count']:,}",
            f"{row['overlapped_bytes'] / 1e9:.3f}",
        )
    return table


def _time(plan: Plan) -> Table:
    table = _table("time of a step", ["", "ms"])
    for name, text in _FLOORS.items():
        table.add_row(text, f"{1e3 * plan.floors[name]:.3f}")
    for name, size in plan.flops_per_step.items():
        table.add_row(f"{name} TFLOP, all chips", f"{size / 1e12:,.3f}")
    if plan.mfu_estimate is not None:
        table.add_row("MFU, an optimistic estimate", f"{plan.mfu_estimate:.1%}")
    table.add_row("compiler, s", f"{plan.compile_seconds:.1f}")
    return table


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
