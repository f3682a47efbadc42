"""One small run, trained by the command line itself, for the commands that read runs."""

import dataclasses

import pytest

from sinkjax.cli import main

MODEL = {
    "model-dim": 22,
    "num-layers": 1,
    "num-heads": 3,
    "num-kv-heads": 1,
    "head-dim": 10,
    "mlp-dim": 17,
    "context-length": 19,
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run, the text it read, and the words that made it."""

    folder: str
    text: str
    argv: tuple[str, ...]


def _train_argv(out, text, *more):
    shape = [word for name, value in MODEL.items() for word in (f"--model.{name}", str(value))]
    return (
        *("train", "--preset", "tiny", "--out", str(out), *shape),
        *("--data.files", str(text), "--data.batch-size", "5"),
        *("--steps", "12", "--log-every", "3", "--eval-every", "6", "--eval-batches", "1", *more),
    )


@pytest.fixture(scope="session")
def train_argv():
    """Folder for the run, its text and further flags -> the words of `sinkjax train ...`."""
    return _train_argv


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    argv = _train_argv(tmp_path_factory.mktemp("runs") / "a run", text)
    assert main(argv) == 0
    return Trained(argv[4], str(text), argv)


@pytest.fixture
def says(capsys):
    """Run a command line that is refused: its one line on standard error."""

    def run(*argv, status=2):
        assert main(argv) == status
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
        return err

    return run
