"""`sinkjax plan`: a large step compiled for chips that are not there."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import tyro

from sinkjax.cli.record import environment, write_json
from sinkjax.models import PRESETS, preset
from sinkjax.models.config import DecoderConfig
from sinkjax.plan import Job, Plan, Ring, Topology, decode_mesh
from sinkjax.plan.job import rows_on, train_mesh
from sinkjax.train.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig

_DEFAULT = "llama3-8b"
_STREAMS = 16  # on each part of `data`, where no --batch says otherwise
_PRESET = tyro.conf.arg(metavar="PRESET", help_behavior_hint="{" + ",".join(PRESETS) + "}")
_OPTIONS = tyro.conf.arg(metavar="[NAME=VALUE ...]")


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Compile the real training step of a model for TPUs that are not there.

    Prints bytes per chip, what is sent and what of that hides, and time floors.

    MFU is an optimistic estimate. Exit status 1: it does not fit.

    Needs the extra `tpu`, no TPU; about a minute for 8B parameters.

    Args:
      preset: model whose shape is the default of --model.*.
      topology: chips, as in v5e:16x16, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4.
      batch: rows of a step; None: one on each part of the mesh that cuts rows (16 to decode).
      decode: plan a decode step on a cache of sink tokens and a window instead.
      context_length: tokens of a training row; None: of the preset.
      window: last tokens that a token sees, in every layer; to decode: of the cache. None: of the
        preset; to decode: what the context length leaves beside the sinks.
      num_sink_tokens: first tokens beside that window; None: of the preset, 4 to decode.
      quick: stop before machine code: less than half the time, temporaries up to a third too low.
      json: also write the numbers here.
      compiler_options: of the TPU's compiler.
      mesh: how the devices are laid out; all along data as far as the width divides, experts along
        expert; to decode as many along model as there are key/value heads.
      optimizer: its state is counted, and its accumulation steps cut the batch.
      model: the shape.
    """

    preset: Annotated[str, tyro.conf.Positional, _PRESET]
    topology: str = "v5p:4x4x8"
    batch: int | None = None
    decode: bool = False
    context_length: int | None = None
    window: int | None = None
    num_sink_tokens: int | None = None
    quick: bool = False
    json: str | None = None
    compiler_options: Annotated[tuple[str, ...], _OPTIONS] = ()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    model: DecoderConfig = dataclasses.field(default_factory=lambda: preset(_DEFAULT))


def default(argv: Sequence[str]) -> PlanCommand:
    """What the flags override: the shape of the preset, and the mesh that suits the step.

    Raises:
      ValueError: there is no such preset or topology.
    """
    name = _preset(argv)
    model = preset(name)
    topology = Topology(_value(argv, "--topology") or PlanCommand.topology)
    mesh = decode_mesh(model, topology) if "--decode" in argv else train_mesh(model, topology)
    return PlanCommand(name, mesh=mesh, model=model)


def _preset(argv: Sequence[str]) -> str:
    """The word that is neither a flag nor the value of one."""
    before = ""
    for word in argv:
        value = before.startswith("--") and "=" not in before
        # A switch has no value: which flags are switches, only the parser knows.
        if not word.startswith("-") and (word in PRESETS or not value):
            return word
        before = word
    if "-h" in argv or "--help" in argv:
        return _DEFAULT
    raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got none")


def _value(argv: Sequence[str], flag: str) -> str | None:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def job(config: PlanCommand) -> Job:
    """What the flags ask for.

    Raises:
      ValueError: a flag that does not fit the others.
    """
    topology, model = Topology(config.topology), config.model
    if config.context_length is not None:
        model = dataclasses.replace(model, context_length=config.context_length)
    ring, rows = None, rows_on(config.mesh, topology)
    if config.decode:
        sinks = 4 if config.num_sink_tokens is None else config.num_sink_tokens
        window = model.context_length - sinks if config.window is None else config.window
        ring, rows = Ring(sinks, window), _STREAMS * rows
    else:
        if config.window is not None:
            model = dataclasses.replace(model, windows=(config.window,))
        if config.num_sink_tokens is not None:
            model = dataclasses.replace(model, num_sink_tokens=config.num_sink_tokens)
        rows *= config.optimizer.accumulation_steps
    rows = config.batch if config.batch is not None else rows
    run = RunConfig(
        model=model, data=DataConfig(batch_size=rows), optimizer=config.optimizer, mesh=config.mesh
    )
    return Job(config.topology, run, ring, config.compiler_options)


def run(config: PlanCommand) -> int:
    """Compile, print, write; 1 if it does not fit."""
    from rich.console import Console

    from sinkjax.plan.table import tables

    started = time.perf_counter()
    found = _plan(job(config), config.quick)
    Console().print(tables(found))
    if config.json is not None:
        device = f"compiled for {found.chips} x {found.job.topology.partition(':')[0]}, not there"
        write_json(config.json, found.numbers | environment(None, started, device))
    return 0 if found.fits else 1


def _plan(wanted: Job, quick: bool) -> Plan:
    from sinkjax.plan import plan

    with _progress(wanted.topology) as progress:
        try:
            return plan(wanted, quick=quick, progress=progress)
        except RuntimeError as error:  # status 1 means that it does not fit
            raise OSError(str(error)) from error


@contextmanager
def _progress(topology: str) -> Iterator[Any]:
    """A line on standard error that says how long it has been, where that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    begun = time.perf_counter()
    with Console(stderr=True).status(f"compiling for {topology}") as status:
        yield lambda stage: status.update(
            f"{stage} for {topology}, {time.perf_counter() - begun:.0f} s"
        )
