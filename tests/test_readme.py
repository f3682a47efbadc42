"""README shows what works: its snippets run, its commands exist, its picture and paths are there."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from sinkjax.cli import entry
from sinkjax.models import preset
from sinkjax.train import RunConfig, fit

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """In one namespace, in a folder where the quickstart's text run is (hardly trained here)."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("def f(x):\n    return x\n" * 400)
    config = RunConfig(model=preset("tiny"), path="runs/quickstart/text", steps=1, eval_batches=1)
    data = {"files": (str(corpus),), "batch_size": 2}
    fit(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)), progress=False)
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(snippets) == 5
    namespace: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (1, 96, 8, 64)
    assert "sink_rate" in capsys.readouterr().out


def test_two_commands_and_what_they_name():
    commands = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    assert len(commands) == 2
    assert commands[0].strip().endswith("sinkjax quickstart")
    assert commands[1].strip().endswith("python -m pytest")


def test_other_commands_have_the_flags_that_are_shown():
    shown = [
        line
        for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
    ]
    assert len(shown) == 3
    for line in shown:
        program, name, *argv = shlex.split(line)
        command = entry.COMMANDS[name]
        module = importlib.import_module(f"sinkjax.cli.{name}")
        options = {"default": getattr(module, command.default)(argv)} if command.default else {}
        assert program == "sinkjax"
        entry.parse(getattr(module, command.config), argv, program, **options)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_are_there(link):
    assert (ROOT / link).exists()


def test_tree_names_what_is_there():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", TEXT, re.S)
    assert tree is not None
    parent = ROOT
    for line in tree[1].splitlines():
        names, indent = line.split("  ")[0] if line[0] != " " else "", line[0] == " "
        if not indent:
            parent = ROOT / names
            assert parent.exists(), names
            continue
        for name in re.match(r"\s+((?:\S+ )+)", line + " ")[1].split(" "):
            if name.endswith(("/", ".py")):
                assert (parent / name).exists(), name
