"""`sinkjax COMMAND ...`: finds the command, parses its flags, and turns bad input into one line."""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from sinkjax.cli.record import version


class Preempted(Exception):
    """SIGTERM ended a command that has saved what it had; says so, or nothing."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: the module `sinkjax.cli.<its name>` with a dataclass and `run(config) -> int`.

    A hyphen in the name is an underscore in that of the module.

    Args:
      config: name of the dataclass in that module; its fields are the flags.
      summary: one line for `sinkjax --help`.
      default: name of a function in the module, argv to the config that flags override, or None.
      resumes: the same command line goes on with what Ctrl-C interrupted.
    """

    config: str
    summary: str
    default: str | None = None
    resumes: bool = False


COMMANDS = {
    "quickstart": Command(
        "Quickstart", "see sinks grow, stream past the context; three minutes", resumes=True
    ),
    "train": Command(
        "Train", "train a model, or go on with a run", default="default", resumes=True
    ),
    "generate": Command("Generate", "stream text from a run, without end if you like"),
    "chat": Command("Chat", "talk with a run, turn by turn, on a constant cache"),
    "stream": Command("Stream", "perplexity of a text of any length, as it is read"),
    "evaluate": Command("Evaluate", "perplexity along a stream, for three cache policies"),
    "cache-report": Command("CacheReport", "perplexity against sinks, policy, budget, bits"),
    "analyze": Command("Analyze", "measure and draw the sinks of a run: report.html"),
    "plan": Command(
        "PlanCommand", "does it fit, how fast: a pod's step compiled without a TPU", "default"
    ),
}

USAGE = "usage: sinkjax [-h] [--version] COMMAND ..."
TRACEBACK = "SINKJAX_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Bad input (`ValueError`, `OSError`, `ImportError`) becomes one line on standard error; set
    SINKJAX_TRACEBACK=1 in the environment to see where it came from. Any other exception is a
    bug of sinkjax and keeps its traceback.

    Args:
      argv: words after `sinkjax`; None takes those of this process.

    Returns:
      Exit status: 0 done, or saved on SIGTERM; 1 failed in the middle (a loss that is no number,
      a closed pipe, another process that failed or was lost); 2 bad input; 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"sinkjax {version()}")
        return 0
    if name not in COMMANDS:
        return _complain(
            "sinkjax", f"expected a command, one of {', '.join(COMMANDS)}; got {name!r}", 2
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know every character
    title = f"sinkjax {name}"
    try:
        with _short_warnings(title):
            return _run(name, argv[1:])
    except SystemExit as stop:  # --help of a command
        return int(stop.code or 0)
    except KeyboardInterrupt:
        again = f"; {_go_on(argv)}" if COMMANDS[name].resumes else ""
        print(f"{title}: interrupted{again}", file=sys.stderr)
        return 130
    except Preempted as stop:
        if str(stop):
            print(f"{title}: {stop}; {_go_on(argv)}", file=sys.stderr)
        return 0
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        return _complain(title, _describe(error), 2, error)
    except FloatingPointError as error:
        return _complain(title, _describe(error), 1, error)


def _go_on(argv: list[str]) -> str:
    return f"go on with: {shlex.join(['sinkjax', *argv])}"


def overview() -> str:
    """What `sinkjax --help` says."""
    width = max(map(len, COMMANDS))
    commands = (f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return "\n".join(
        [
            USAGE,
            "",
            "Attention sinks: use them, understand them, remove them.",
            "",
            "commands:",
            *commands,
            "",
            "options:",
            f"  {'-h, --help':<{width}}  this text; `sinkjax COMMAND --help` for one command",
            f"  {'--version':<{width}}  the version",
        ]
    )


def _run(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    module = importlib.import_module(f"sinkjax.cli.{name.replace('-', '_')}")
    default = {} if command.default is None else {"default": getattr(module, command.default)(argv)}
    return module.run(parse(getattr(module, command.config), argv, f"sinkjax {name}", **default))


def parse(config: type, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """An instance of a config dataclass from flags, by tyro.

    Raises:
      ValueError: one line in place of tyro's box.
      SystemExit: of status 0, after `--help`.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, prog=prog, args=argv, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_unbox(box.getvalue())) from stop.__context__


def _unbox(text: str) -> str:
    """The message of tyro's box, without frame, colours, repeated help and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    parts: list[list[str]] = [[]]
    for row in text.splitlines():
        content = row.strip(" │")
        if re.fullmatch(r"[─-]{4,}", content):
            parts.append([])
        elif content and content[0] not in "╭╰":
            parts[-1].append(content)
    if "╭" not in text:  # the title of a box in an encoding without lines
        del parts[0]
    message = " ".join(parts[0]).removeprefix("Error parsing ")
    message = message.replace("invalid literal for int() with base 10:", "expected an integer, got")
    message = message.replace("could not convert string to float:", "expected a number, got")
    for part in parts[1:]:
        if part[:1] == ["Perhaps you meant:"]:
            message += f"; perhaps {part[1]}"
    return message


def _complain(title: str, message: str, status: int, error: Exception | None = None) -> int:
    if error is not None and os.environ.get(TRACEBACK, "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    print(f"{title}: error: {message}", file=sys.stderr)
    return status


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{where}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


@contextlib.contextmanager
def _short_warnings(title: str) -> Iterator[None]:
    """Warnings as one line each, without the line of code they came from."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"{title}: warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
