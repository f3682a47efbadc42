"""The notebooks: both sides of each pair agree, every cell runs, an old runtime is refused."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jupytext
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
QUICKSTART = ROOT / "colab" / "00_quickstart.ipynb"


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_every_script_has_its_notebook() -> None:
    assert QUICKSTART in NOTEBOOKS
    scripts = {path.with_suffix(".ipynb") for path in (ROOT / "colab").glob("*.py")}
    assert scripts == set(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_sides_of_a_pair_agree(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    script = jupytext.read(path.with_suffix(".py"))
    assert cells(notebook) == cells(script), f"run: jupytext --sync {path.with_suffix('.py')}"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "outputs are not committed"


def test_the_badge_opens_this_notebook() -> None:
    address = "https://colab.research.google.com/github/sinkjax/sinkjax/blob/main/"
    first = nbformat.read(QUICKSTART, as_version=4).cells[0].source
    assert address + QUICKSTART.relative_to(ROOT).as_posix() in first


def execute(path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook with its outputs, from a kernel of this Python that knows no user settings."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    settings = {
        "IPYTHONDIR": str(scratch / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "JUPYTER_PATH": str(scratch),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SINKJAX_SMOKE": "1",
        "TMPDIR": str(scratch),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    write_kernel_spec(scratch / "kernels" / "of-this-python")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="of-this-python",
        timeout=300,
        resources={"metadata": {"path": str(scratch)}},
    )
    return client.execute()


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute(QUICKSTART, tmp_path, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    complaints = "".join(output.text for output in outputs if output.get("name") == "stderr")
    pictures = [output.data for output in outputs if "image/png" in output.get("data", {})]
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in printed
    for expected in (
        "softmax   attention of idle queries to BOS 0.",
        "softmax1  attention of idle queries to BOS 0.",
        "nats per byte",
        "200 tokens from a model with a context of 64, 140 evicted",
        "\ndef ",
        "Attention sinks: ",
        "sink_rate ",
        "v drain",
    ):
        assert expected in printed, f"{expected!r} is not in\n{printed}"
    assert not complaints
    assert len(pictures) == 4  # one for each cell that ends in a figure
    assert (tmp_path / "ipython").exists()  # the kernel took the settings
    assert list(tmp_path.glob("sinkjax-*/text/checkpoints/20"))


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> tuple[dict[str, Any], list[Any]]:
    """Run the install cell with these modules in place; its names, and the magics it called."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)
    cell = next(c for c in nbformat.read(QUICKSTART, as_version=4).cells if c.cell_type == "code")
    magics: list[Any] = []

    def run_line_magic(name: str, line: str) -> None:
        magics.append((name, line.format_map(names)))  # IPython fills {names} in

    names: dict[str, Any] = {"get_ipython": lambda: SimpleNamespace(run_line_magic=run_line_magic)}
    exec(TransformerManager().transform_cell(cell.source), names)
    return names, magics


def test_on_an_ordinary_machine_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax

    _, magics = install(monkeypatch)
    assert not magics
    assert f"jax {jax.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "tpu", "extra"), [(None, "", ""), ("/bin/smi", "", "[cuda]"), ("", "V5E", "[tpu]")]
)
def test_on_colab_it_installs_what_the_machine_needs_once(
    gpu: str | None, tpu: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = "importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: gpu)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    if tpu:
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", tpu)
    _, magics = install(monkeypatch, google__colab=ModuleType("google.colab"))
    source = f"sinkjax{extra} @ git+https://github.com/sinkjax/sinkjax"
    assert magics == [("pip", f'install --quiet --upgrade "{source}"')]
    monkeypatch.setattr(find_spec, lambda name: SimpleNamespace())  # after the restart
    assert not install(monkeypatch)[1]


def test_an_old_jax_that_is_still_loaded_asks_for_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match=r"still holds jax 0\.7\.2.*Restart it \(in Colab"):
        install(monkeypatch, jax=SimpleNamespace(__version__="0.7.2"))


def test_an_old_jax_that_is_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_runtime = install(monkeypatch)[0]["check_runtime"]
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(RuntimeError, match=r"needs jax 0\.10 or newer, this runtime has 0\.9\.2"):
        check_runtime({"jax": "0.9.2"})
    check_runtime({"jax": "0.10.0"})
    check_runtime({"jax": "0.12.0.1"})
