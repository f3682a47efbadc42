"""What the design promises about the code itself."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"sinkjax": ROOT / "sinkjax", "sinkjax_kernels": ROOT / "kernels" / "sinkjax_kernels"}
SOURCES = sorted(p for folder in PACKAGES.values() for p in folder.rglob("*.py"))
OTHERS = sorted(
    p for room in ("tests", "experiments", "colab") for p in (ROOT / room).rglob("*.py")
)

_HEAVY = "import sinkjax, sys; print(sorted({m.partition('.')[0] for m in sys.modules}))"


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(cwd), str(cwd / "kernels")]),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def lint(cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import importlinter.cli as c, sys; sys.exit(c.lint_imports(no_cache=True))"
    return python("-c", code, cwd=cwd)


def test_the_arrows_point_one_way() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("sinkjax/ops/norms.py", "import sinkjax.models", "the arrows of the design"),
        ("sinkjax/stream/__init__.py", "import sinkjax.train", "the arrows of the design"),
        ("sinkjax/ops/norms.py", "from sinkjax import __version__", "no module imports the bare"),
        ("kernels/sinkjax_kernels/masks.py", "import sinkjax.typing", "kernels are arrays in"),
        ("kernels/sinkjax_kernels/masks.py", "from flax import nnx", "kernels are arrays in"),
        ("sinkjax/ops/norms.py", "from flax import nnx", "ops know no parameters"),
    ],
)
def test_an_arrow_that_points_back_is_caught(
    module: str, line: str, contract: str, tmp_path: Path
) -> None:
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sinkjax", tmp_path / "sinkjax", ignore=no_cache)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=no_cache)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / module, "a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


def test_import_is_light() -> None:
    done = python("-W", "error", "-c", _HEAVY)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert {"sinkjax", "sinkjax_kernels", "jax"} <= loaded
    assert not loaded & {"matplotlib", "orbax", "grain", "tyro", "flax", "optax", "tokenizers"}


def test_rooms_are_loaded_when_named() -> None:
    code = (
        "import sinkjax; assert 'models' in dir(sinkjax);"
        "print(sinkjax.models.__name__, sinkjax.typing.__name__,"
        "      callable(sinkjax.dot_product_attention))"
    )
    done = python("-c", code)
    assert done.stdout.split() == ["sinkjax.models", "sinkjax.typing", "True"], done.stderr
    unknown = python("-c", "import sinkjax; sinkjax.modles")
    assert "module 'sinkjax' has no attribute 'modles'" in unknown.stderr


@pytest.mark.parametrize(
    ("jax_version", "flax_version", "works"),
    [
        ("0.10.2", "0.12.8", True),
        ("0.11.1", "0.12.12", True),
        ("0.12.0.1", "0.12.12", True),
        ("0.13.0.dev20270101", "0.13.0", True),
        ("0.7.2", "0.11.2", False),
        ("0.12.0.1", "0.12.8", False),
        ("0.10.2", "0.12.12", False),
        ("0.11.0", "0.12.12", False),
        ("0.10.2", "0.11.2", False),
    ],
)
def test_pairs_of_versions(jax_version: str, flax_version: str, works: bool) -> None:
    from sinkjax._compat import check_versions

    if works:
        return check_versions(jax_version, flax_version)
    with pytest.raises(ImportError, match=rf"got (jax )?{re.escape(jax_version)}.*restart Python"):
        check_versions(jax_version, flax_version)


def imports(path: Path) -> set[str]:
    """First parts of the names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_kernels_import_only_jax_jaxtyping_and_numpy() -> None:
    allowed = {"jax", "jaxtyping", "numpy", "sinkjax_kernels"} | set(sys.stdlib_module_names)
    for path in PACKAGES["sinkjax_kernels"].rglob("*.py"):
        assert imports(path) <= allowed, path


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES}
    too_long = {str(path): n for path, n in lengths.items() if n > 600}
    assert not too_long
    assert statistics.median(n for n in lengths.values() if n) < 180


def test_a_file_is_named_by_its_idea() -> None:
    names = {path.stem for path in SOURCES + OTHERS}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_only_compat_asks_for_versions_and_nobody_for_internals() -> None:
    version = re.compile(r"__version(_info)?__\s*(<|>|==|!=)|version_info|packaging\.version")
    for path in SOURCES:
        text = path.read_text()
        assert "jax._src" not in text, path
        assert path.name == "_compat.py" or not version.search(text), path
    for path in SOURCES + OTHERS:
        # jaxtyping reads annotations when the function is made.
        tree = ast.parse(path.read_text())
        future = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not any(n.module == "__future__" for n in future), path


def test_test_folders_are_not_packages() -> None:
    rooms = ("tests", "kernels", "experiments", "colab")
    found = [p for room in rooms for p in (ROOT / room).rglob("__init__.py")]
    assert not [p for p in found if PACKAGES["sinkjax_kernels"] not in p.parents]


def test_ci_runs_the_command_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line.strip() for line in lines if "-m venv" in line and "-m pytest" in line]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()
