"""Commands found, flags parsed, errors in one line."""

import dataclasses
import re
import subprocess
import sys
import types
import warnings

import pytest

from sinkjax.cli import entry, main


@dataclasses.dataclass(frozen=True)
class Broken:
    """A command for tests.

    Args:
      count: how many.
      share: how much.
    """

    count: int = 3
    share: float = 0.5

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count: expected at least 1, got {self.count}, and {'more ' * 30}")


@pytest.fixture
def broken(monkeypatch):
    """Make `sinkjax broken` do something."""

    def install(action):
        module = types.ModuleType("sinkjax.cli.broken")
        module.Config, module.run = Broken, action
        monkeypatch.setitem(sys.modules, "sinkjax.cli.broken", module)
        monkeypatch.setitem(
            entry.COMMANDS, "broken", entry.Command("Config", "breaks", resumes=True)
        )

    return install


def raising(error):
    def action(config):
        raise error

    return action


def test_help_names_every_command_and_loads_none_of_their_libraries():
    script = (
        "import sys; from sinkjax.cli import main; assert main(['--help']) == 0\n"
        "heavy = {'flax', 'grain', 'matplotlib', 'optax', 'orbax', 'rich', 'tyro'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    path = [p for p in sys.path if p]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    for name, command in entry.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", found.stdout, re.MULTILINE)
    assert all(len(line) <= 80 for line in found.stdout.splitlines())


def test_no_command_shows_the_help_and_version_the_version(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == entry.overview() + "\n"
    assert main(["--version"]) == 0
    assert re.fullmatch(r"sinkjax \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("name", list(entry.COMMANDS))
def test_help_of_a_command_fits_and_explains_every_flag(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"usage: sinkjax {name} ")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    # A flag, its kind, then words: "(default: ...)" alone explains nothing.
    rows = " ".join(line.strip("│ ") for line in lines[1:])
    flags = re.split(r" (?=--[a-z])", rows)[1:]
    assert len(flags) > 4
    bare = [flag for flag in flags if re.match(r"--\S+( [A-Z{\[][^ ]*)? *\(default", flag)]
    assert not bare, bare


def test_an_unknown_command_lists_the_commands(says):
    line = says("trian")
    assert line.startswith("sinkjax: error: expected a command, one of quickstart, train,")
    assert "got 'trian'" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cuont", "4"], "Unrecognized options: --cuont, 4; perhaps --count INT"),
        (["--count", "four"], "--count: expected an integer, got 'four'"),
        (["--share", "half"], "--share: expected a number, got 'half'"),
        (["--count"], "Missing value for argument '--count'"),
        (["more"], "Unrecognized options: more"),
        (["--count", "0"], "count: expected at least 1, got 0, and more more more"),
    ],
)
def test_a_bad_flag_is_one_line(broken, says, words, expected):
    broken(raising(AssertionError("never reached")))
    line = says("broken", *words)
    assert line.startswith("sinkjax broken: error: ") and expected in line


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (ValueError("window: expected\n  at least 1"), 2, "window: expected at least 1"),
        (OSError(28, "No space left on device", "/x/y"), 2, "No space left on device: /x/y"),
        (ImportError("needs pip install 'sinkjax[hf]'"), 2, "needs pip install 'sinkjax[hf]'"),
        (FloatingPointError("step 3: loss is nan"), 1, "step 3: loss is nan"),
    ],
)
def test_what_a_user_can_mend_is_one_line(broken, says, error, status, expected):
    broken(raising(error))
    assert says("broken", status=status) == f"sinkjax broken: error: {expected}\n"


@pytest.mark.parametrize("error", [TypeError("a bug"), AssertionError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(broken, error):
    broken(raising(error))
    with pytest.raises(type(error)):
        main(["broken"])


def test_developers_can_see_where_an_error_came_from(broken, capsys, monkeypatch):
    broken(raising(ValueError("no")))
    monkeypatch.setenv("SINKJAX_TRACEBACK", "1")
    assert main(["broken"]) == 2
    err = capsys.readouterr().err
    assert "in action" in err and err.endswith("sinkjax broken: error: no\n")


def test_an_interrupt_says_how_to_go_on(broken, says):
    broken(raising(KeyboardInterrupt()))
    line = says("broken", "--share", "1.5", status=130)
    assert line.endswith("interrupted; go on with: sinkjax broken --share 1.5\n")


def test_a_closed_pipe_is_quiet(broken, capsys, monkeypatch):
    broken(raising(BrokenPipeError(32, "Broken pipe")))
    assert main(["broken"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(broken, says):
    def warn(config):
        warnings.warn("positions are past\nthe context_length", stacklevel=1)
        return 2

    broken(warn)
    assert says("broken") == "sinkjax broken: warning: positions are past the context_length\n"
