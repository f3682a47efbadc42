"""What is to be planned: a training step or a decode step on a slice of chips."""

import dataclasses
import math

from sinkjax.cache import SinkWindow
from sinkjax.models.config import DecoderConfig
from sinkjax.plan.topology import Topology
from sinkjax.strict_json import from_json, parse
from sinkjax.train.config import MeshConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Ring:
    """The cache of a decode step: the first tokens of the stream and the last ones.

    Args:
      num_sink_tokens: P.
      window: W. Where 8 does not divide P + W, the TPU's compiler copies the cache around the kernel.
    """

    num_sink_tokens: int
    window: int

    @property
    def description(self) -> SinkWindow:
        """As the cache has it."""
        return SinkWindow(self.num_sink_tokens, self.window)


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to compile.

    Args:
      topology: name of the slice.
      run: model, mesh, optimiser; `data.batch_size` is rows of a step. Of a decode step model, mesh
        and rows count.
      ring: the cache of a decode step; None plans a training step.
      compiler_options: of the TPU's compiler, `name=value`, beside those of the step itself.

    Raises:
      ValueError: the topology or an option is not written as it should be.
    """

    topology: str
    run: RunConfig
    ring: Ring | None = None
    compiler_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Topology(self.topology)
        for option in self.compiler_options:
            if not all(option.partition("=")):
                raise ValueError(f"compiler-options: expected name=value, got {option!r}")

    @property
    def options(self) -> dict[str, str]:
        """The compiler's options by name."""
        parts = (option.partition("=") for option in self.compiler_options)
        return {name: value for name, _, value in parts}

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.run.data.batch_size


def read_job(text: str) -> Job:
    """A job from the JSON of `sinkjax.strict_json.to_json`.

    Raises:
      ValueError: as `from_json`.
    """
    values = dict(parse(text, "job"))
    ring = values.pop("ring", None)
    job = from_json(Job, values, name="job")
    return job if ring is None else dataclasses.replace(job, ring=from_json(Ring, ring))


def train_mesh(model: DecoderConfig, topology: Topology) -> MeshConfig:
    """A mesh to train on: FSDP over all devices, as far as the width of the model divides.

    A mixture of experts is cut over `expert` too, by 4 or as much as lets the width divide; a dense
    model whose width does not divide, over `model`.
    """
    axis, beside = ("expert", 4) if model.num_experts else ("model", 1)
    while beside < topology.devices and model.model_dim % (topology.devices // beside):
        beside *= 2
    size = math.gcd(beside, topology.devices)
    return MeshConfig(expert=size) if axis == "expert" else MeshConfig(model=size)


def decode_mesh(model: DecoderConfig, topology: Topology) -> MeshConfig:
    """A mesh to decode on: key/value heads over `model` as far as they divide, rows over `data`.

    Why: what a token costs is reading weights and cache, so they are cut and stay where they are.
    """
    return MeshConfig(model=math.gcd(model.num_kv_heads, topology.devices))


def rows_on(mesh: MeshConfig, topology: Topology) -> int:
    """Into how many parts a mesh cuts the rows of a batch."""
    if mesh.data != -1:
        return mesh.data * mesh.expert
    return max(1, topology.devices // (mesh.model * mesh.sequence))
