"""Golden arrays: what code of other projects gave for small inputs, kept so that a machine without
that code compares all the same.

A file of tests here has `CASES`, and for each a NumPy archive `golden/<file>/<case>.npz` with inputs,
the peer's outputs and gradients, and the versions that made them. The default suite compares
sinkjax with the archive. With the extra `parity` installed, `-m parity` runs the peer again, on the
inputs that the code makes now, and holds both the archive and sinkjax to it; with `--regenerate`
it writes the archive instead.
"""

import importlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

Arrays = dict[str, np.ndarray]

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "python -m pytest -n0 -m parity tests/parity --regenerate"
INSTALL = "pip install torch==2.13.0, then pip install -e '.[test,parity]'"

# By the type of the peer's arrays: the same formulas in another order of operations.
TOLERANCES = {"float64": 1e-9, "float32": 2e-5}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="tests marked parity write tests/parity/golden instead of comparing with it",
    )


class Golden:
    """The archives of one file of tests."""

    def __init__(self, name: str, cases: list[str], regenerate: bool) -> None:
        self.folder = GOLDEN / name.removeprefix("test_")
        self.regenerate = regenerate
        stored = {path.stem: path for path in self.folder.glob("*.npz")}
        for case in set(stored) - set(cases):
            if not regenerate:
                raise AssertionError(f"{stored[case]} belongs to no case; run {REGENERATE}")
            stored[case].unlink(missing_ok=True)

    def read(self, case: str) -> tuple[Arrays, Arrays]:
        """Inputs and the peer's results."""
        with np.load(self.folder / f"{case}.npz", allow_pickle=False) as archive:
            versions = json.loads(str(archive["versions"]))
            assert {"torch", "transformers", "entmax"} <= set(versions)
            parts = {
                part: {
                    name.removeprefix(part): archive[name]
                    for name in archive.files
                    if name.startswith(part)
                }
                for part in ("inputs/", "results/")
            }
        return parts["inputs/"], parts["results/"]

    def settle(self, case: str, inputs: Arrays, results: Arrays) -> None:
        """Hold the archive to what the peer gives now, or write it."""
        if self.regenerate:
            self._write(case, inputs, results)
        stored_inputs, stored_results = self.read(case)
        assert set(stored_inputs) == set(inputs), f"stale inputs; run {REGENERATE}"
        for name, x in inputs.items():
            np.testing.assert_array_equal(stored_inputs[name], x, f"stale; run {REGENERATE}")
        self.agree(stored_results, results, f"stale, or the peer has changed; run {REGENERATE}")

    def agree(self, got: Arrays, expected: Arrays, hint: str = "") -> None:
        """Compare by name; each array within the tolerance of its own type, relative to its size."""
        assert set(got) == set(expected), hint
        for name, x in expected.items():
            assert got[name].dtype == x.dtype, name
            bound = TOLERANCES[x.dtype.name]
            size = np.abs(x).max()
            assert np.isfinite(size), name
            np.testing.assert_allclose(
                got[name], x, rtol=0, atol=bound * max(size, 1e-3), err_msg=f"{name} {hint}"
            )

    def _write(self, case: str, inputs: Arrays, results: Arrays) -> None:
        peers = ("torch", "transformers", "entmax", "kvpress", "numpy")
        # Without "+cpu": which build it was changes nothing, and would change the file.
        versions = {name: importlib.metadata.version(name).partition("+")[0] for name in peers}
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            self.folder / f"{case}.npz",
            versions=np.array(json.dumps(versions)),
            **{f"inputs/{name}": x for name, x in inputs.items()},
            **{f"results/{name}": x for name, x in results.items()},
        )


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The archives of this file."""
    name = request.module.__name__.rpartition(".")[2]
    regenerate = request.config.getoption("--regenerate", default=False)
    return Golden(name, list(request.module.CASES), bool(regenerate))


@pytest.fixture(scope="session")
def peer():
    """Import a module of another project; a missing one fails, as parity was asked for."""

    def load(module: str):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            pytest.fail(f"-m parity needs {error.name}, which is not installed: {INSTALL}")

    return load
