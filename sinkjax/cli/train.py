"""`sinkjax train`: a run folder from flags."""

import dataclasses
import itertools
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from sinkjax.cli.entry import Preempted
from sinkjax.cli.record import environment, write_json
from sinkjax.models import PRESETS, count, preset
from sinkjax.models.variants import variant
from sinkjax.train.config import RunConfig
from sinkjax.train.distributed import DistributedConfig, joined
from sinkjax.train.presets import train_preset

# tyro does not wrap a description: every paragraph fits 80 columns.
_ABOUT = """Train a model, or go on with a run that was interrupted or killed.

Preset, variant and recipe give the defaults of --model.*, --optimizer.* and
--penalties.*, and flags override them.

Ctrl-C and SIGTERM save and say how to go on; the latter ends with status 0.

Hosts run one command with --distributed.mode auto on an OUT that all see.

The numbers at the end: OUT/summary.json.
"""
_PRESET = Annotated[
    str,
    tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}", help="model whose shape is the default."),
]
_VARIANT = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help="attention variant such as softmax1 or 'gate, head-wise'; a wrong name lists all.",
    ),
]
_RECIPE = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help="published settings of the optimiser, such as gu or osp; a wrong name lists all.",
    ),
]
_NAMED = {"preset": "tiny", "variant": "softmax", "recipe": "none"}


def _train() -> type:
    """`RunConfig` with three names in front, and its folder called --out as in every command."""
    fields: list[Any] = [
        (name, kind, dataclasses.field(default=_NAMED[name]))
        for name, kind in (("preset", _PRESET), ("variant", _VARIANT), ("recipe", _RECIPE))
    ]
    for field in dataclasses.fields(RunConfig):
        kind: Any = field.type
        if field.name == "path":
            kind = Annotated[str, tyro.conf.arg(name="out")]
        given = {"default": field.default, "default_factory": field.default_factory}
        fields.append((field.name, kind, dataclasses.field(**given)))
    fields.append(
        ("distributed", DistributedConfig, dataclasses.field(default=DistributedConfig()))
    )
    arguments = (RunConfig.__doc__ or "").partition("Args:")[2]
    about = {"__doc__": f"{_ABOUT}\nArgs:{arguments}"}
    return dataclasses.make_dataclass("Train", fields, frozen=True, namespace=about)


Train = _train()


def default(argv: Sequence[str]) -> Any:
    """What the flags override: the config of the preset, variant and recipe that they name.

    Raises:
      ValueError: there is no such name; lists the choices.
    """
    named = dict(_NAMED)
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and flag in named:
            named[flag] = value if equals else following
    model = preset(named["preset"])
    model = dataclasses.replace(model, **variant(named["variant"], model.context_length).fields)
    run = RunConfig(model=model)
    if named["recipe"] != "none":
        run = train_preset(named["recipe"]).apply(run)
    return Train(**named, model=run.model, optimizer=run.optimizer, penalties=run.penalties)


def run(config: Any) -> int:
    """Train, say what came out, and leave it in `summary.json` of the run folder.

    Raises:
      KeyboardInterrupt: Ctrl-C; the run is saved.
      Preempted: SIGTERM; likewise.
    """
    started = time.perf_counter()
    names = [field.name for field in dataclasses.fields(RunConfig)]
    wanted = RunConfig(**{name: getattr(config, name) for name in names})
    from sinkjax.train.loop import fit

    with joined(config.distributed):
        done = fit(wanted)
        first = jax.process_index() == 0
        if first and not done.interrupted:
            _tell(done, started)
    if done.preempted:
        raise Preempted(f"stopped by SIGTERM at step {done.step:,}; saved" if first else "")
    if done.interrupted:
        raise KeyboardInterrupt
    return 0


def _tell(done: Any, started: float) -> None:
    wanted = done.config
    validation = [record for record in done.metrics if record["split"] == "validation"][-1]
    parameters = count(wanted.model)
    summary = done.path / "summary.json"
    if not _tells_of(summary, done.step):  # a finished run keeps its seconds
        numbers = {"steps": done.step, "parameters": parameters, "validation": validation}
        write_json(summary, numbers | environment(wanted.seed, started))
    print(
        f"{done.path}: {done.step:,} steps, {parameters:,} parameters, "
        f"validation loss {validation['nll']:.4f} nats per token"
    )
    if wanted.data.source == "text":
        for command in ("generate", "evaluate", "analyze"):
            print(f"next: sinkjax {command} {shlex.quote(str(done.path))}")


def _tells_of(summary: Path, steps: int) -> bool:
    try:
        return json.loads(summary.read_text(encoding="utf-8")).get("steps") == steps
    except (OSError, ValueError):
        return False
