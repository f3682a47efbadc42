"""The commands of `python -m sinkjax_kernels.bench`."""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from sinkjax_kernels import cases
from sinkjax_kernels.bench import chips
from sinkjax_kernels.bench.llo import ScheduleError
from sinkjax_kernels.bench.table import format_table, write_lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status is 1 where something failed or missed its target, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m sinkjax_kernels.bench",
        description="How fast the kernels are.",
        epilog="The exit status is 1 when a target is missed or something could not be measured.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    schedule = _command(
        commands,
        _schedule,
        "schedule",
        "static cycles of our TPU kernels and of splash attention, without a TPU",
    )
    # No target is of tpu7x, and it would take as long as another.
    names = [c.name for c in chips.TPUS]
    _choices(schedule, "chip", names, default=[n for n in names if n != "tpu7x"])
    _processes(schedule)
    blocks = _command(
        commands,
        _blocks,
        "blocks",
        "find our best block sizes, one at a time from the shipped ones (five minutes a chip)",
        cases_of_default=["sink-window-8k", "causal-8k"],  # narrow windows have no `chunk`
    )
    _choices(blocks, "chip", [c.name for c in chips.TPUS])
    _processes(blocks)
    blocks = _command(
        commands, _splash_blocks, "splash-blocks", "find splash's best block sizes (half an hour)"
    )
    _choices(blocks, "chip", [c.name for c in chips.TPUS])
    _processes(blocks)
    timing = _command(commands, _time, "time", "measured on the device that is there")
    timing.add_argument("--implementation", nargs="+", metavar="NAME", help="all by default")
    timing.add_argument("--length", type=_positive, help="tokens, instead of each case's own")
    timing.add_argument("--batch", type=_positive, default=1, help="sequences (default 1)")
    timing.add_argument("--heads", type=_positive, help="query heads, instead of each case's own")
    timing.add_argument(
        "--repetitions",
        type=_positive,
        default=7,
        help="of which the median is printed (default 7)",
    )
    timing.add_argument(
        "--limit", type=float, default=10.0, help="largest dense score matrix, GiB (default 10)"
    )
    options = parser.parse_args(arguments)
    return options.run(options)


def _command(
    commands,
    run: Callable[..., int],
    name: str,
    text: str,
    cases_of_default: list[str] | None = None,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    _choices(parser, "case", [c.name for c in cases.CASES], cases_of_default)
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="PATH", help="also write the rows, one object per line"
    )
    return parser


def _choices(parser, name: str, values: list[str], default: list[str] | None = None) -> None:
    chosen = "all" if default is None else ", ".join(default)
    parser.add_argument(
        f"--{name}", nargs="+", metavar="NAME", choices=values, default=default or values,
        help=f"of {', '.join(values)}; {chosen} by default",
    )  # fmt: skip


def _processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=_positive, default=2, help="that compile at a time (default 2)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _progress(total: int) -> Callable[[str, object], None] | None:
    """Counts on a terminal, quiet elsewhere."""
    if not sys.stderr.isatty():
        return None
    start, count = time.perf_counter(), 0

    def done(chip, job):
        nonlocal count
        count += 1
        seconds = time.perf_counter() - start
        print(f"\r{count}/{total} compiled, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)
        if count == total:
            print(file=sys.stderr)

    return done


def _schedule(options: argparse.Namespace) -> int:
    from sinkjax_kernels.bench import pool, schedule

    chosen = [cases.case(name) for name in options.case]
    total = sum(
        len({pool.key(job) for case in chosen for job in schedule.jobs_for(case, chip)})
        for chip in options.chip
    )
    start = time.perf_counter()
    rows, errors = schedule.measure(chosen, options.chip, options.processes, _progress(total))
    print(
        "Static cycles per query head; a tile is a straight piece of the program with matrix work, its "
        "bundles are the mean."
    )
    print(
        format_table(
            ["case", "chip", "pass", "by", "bundles/tile", "tiles", "cycles", "MXU floor", "XLA cycles",
             "program (bundles)", "spills", "temp (MiB)", "build (s)"],
            [[r.case, r.chip, r.which, r.implementation, r.bundles_per_tile, r.blocks, r.cycles,
              r.mxu_floor, r.xla_cycles, r.program, r.spills,
              None if r.temp_bytes is None else r.temp_bytes / schedule.MIB, r.build_seconds]
             for r in rows],
        )
    )  # fmt: skip
    for r in rows:
        if r.skipped:
            print(
                f"{r.case} {r.chip} {r.which}: {r.skipped:,} bundles that run only for some data are not "
                "in the cycles"
            )
    ratios, bounds = schedule.ratios(rows), schedule.bounds(rows)
    missed = [c for c in [*ratios, *bounds] if c.verdict == "missed"]
    print("\nCycles against splash's, each at least what its matrix work needs")
    print(
        format_table(
            ["case", "chip", "pass", "ratio", "target", "verdict", "note"],
            [[*c.what.split(), c.value, c.most, c.verdict, c.note] for c in ratios],
        )
    )
    print("\nOther bounds")
    print(
        format_table(
            ["what", "value", "at most", "verdict"],
            [[c.what, c.value, c.most, c.verdict] for c in bounds],
        )
    )
    for error in errors:
        print(f"not measured: {error}")
    print(
        f"\n{len(missed)} of {sum(c.most is not None for c in [*ratios, *bounds])} targets missed, "
        f"{len(errors)} calls not measured, {time.perf_counter() - start:.0f} s"
    )
    if options.json:
        write_lines(options.json, [r.as_json() for r in rows])
    return int(bool(missed or errors))


def _blocks(options: argparse.Namespace) -> int:
    from sinkjax_kernels.bench import our_blocks

    chosen = [cases.case(name) for name in options.case]
    try:
        rows, left_out = our_blocks.search(chosen, options.chip, options.processes)
    except ScheduleError as error:
        print(f"not measured: {error}")
        return 1
    print(
        format_table(
            ["case", "chip", "pass", "cycles", "with the shipped blocks"],
            [[r["case"], r["chip"], r["pass"], r["cycles"], r["cycles_shipped"]] for r in rows],
        )
    )
    for reason in left_out:
        print(f"left out: {reason}")
    print("\nFor sinkjax_kernels/flash/tpu_blocks.py:\n" + our_blocks.as_source(rows))
    if options.json:
        write_lines(options.json, rows)
    return 0


def _splash_blocks(options: argparse.Namespace) -> int:
    from sinkjax_kernels.bench import splash_blocks

    chosen = [cases.case(name) for name in options.case]
    rows, errors = splash_blocks.search(chosen, options.chip, options.processes)
    print(
        format_table(
            ["case", "chip", "kernel", "block (queries × keys)", "cycles", "cycles at 512 × 512"],
            [[r["case"], r["chip"], r["kernel"], "{} × {}".format(*r["sizes"]), r["cycles"],
              r["cycles_512"]] for r in rows],
        )
    )  # fmt: skip
    for error in errors:
        print(f"not measured: {error}")
    print("\nFor sinkjax_kernels/bench/splash_blocks.py:\n" + splash_blocks.as_source(rows))
    if options.json:
        write_lines(options.json, rows)
    return int(bool(errors))


def _time(options: argparse.Namespace) -> int:
    from sinkjax_kernels.bench import timing

    return timing.run(options)
