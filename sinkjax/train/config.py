"""What a training run is: frozen dataclasses that are the command line, the JSON and the call."""

import dataclasses
from typing import Any, Literal

from sinkjax.models.config import DecoderConfig
from sinkjax.models.presets import preset
from sinkjax.ops.penalties import ROUTER_PENALTIES

# Parameters that weight decay leaves alone: few, one-sided and not matrices that mix features. They
# are everything of a norm but the matrices of a low-rank gate; biases; and of attention sink logits,
# gates, forget gates, learned keys and values, constants of normalisers, distance biases and
# differential mixing. `mlp/gate` is an ordinary matrix and decays.
NO_DECAY = (
    r"/[a-z_]*norm[a-z_]*/(?!(down|up)$)",
    r"/bias$",
    r"/sinks$",
    r"attention/(gate|forget|token_sinks|kv_bias|normalizer|distance_bias|differential)(/|$)",
)


def _check(fine: bool, name: str, expected: str, got: Any) -> None:
    if not fine:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out, see `sinkjax.sharding.make_mesh`.

    Args:
      data: devices along which the batch is cut; -1 takes all that the others leave.
      model: devices along which the parts of a layer are cut.
      expert: devices along which experts are cut, and the batch too.
      sequence: devices along which the tokens of a row are cut.
      explicit: layouts are part of the types and nothing moves unasked; else the compiler decides.
    """

    data: int = -1
    model: int = 1
    expert: int = 1
    sequence: int = 1
    explicit: bool = False

    def __post_init__(self) -> None:
        _check(self.data == -1 or self.data >= 1, "mesh.data", "-1 or at least 1", self.data)
        for field in ("model", "expert", "sequence"):
            _check(getattr(self, field) >= 1, f"mesh.{field}", "at least 1", getattr(self, field))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model reads.

    Args:
      source: "text" for files, "backcopy" for the Bigram-Backcopy toy task.
      files: paths, folders or globs; none means the standard library of the running Python.
      max_bytes: read no more than about this many bytes (whole files, picked by hash); None is all.
      tokenizer: "bytes", or the path of a `tokenizer.json` (extra `hf`).
      batch_size: rows of one optimiser step, over all devices and processes.
      validation_fraction: share of the files held out.
      seed: seed of the order of rows.
      bos: what leads a text, after the learned sink tokens: "document" puts BOS before every piece of
        every document; "none" nothing, so that its first token is a target only behind a learned
        sink token. A model trained so has never seen BOS.
    """

    source: Literal["text", "backcopy"] = "text"
    files: tuple[str, ...] = ()
    max_bytes: int | None = None
    tokenizer: str = "bytes"
    batch_size: int = 16
    validation_fraction: float = 0.05
    seed: int = 0
    bos: Literal["document", "none"] = "document"

    def __post_init__(self) -> None:
        choices = ("text", "backcopy")
        _check(self.source in choices, "data.source", f"one of {choices}", self.source)
        _check(
            self.max_bytes is None or self.max_bytes >= 1,
            "data.max_bytes",
            "None or at least 1",
            self.max_bytes,
        )
        _check(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        _check(
            0.0 < self.validation_fraction < 1.0,
            "data.validation_fraction",
            "a number between 0 and 1",
            self.validation_fraction,
        )
        policies = ("document", "none")
        _check(self.bos in policies, "data.bos", f"one of {policies}", self.bos)
        # The heads of the toy task have BOS to rest on, or there is nothing to see.
        fine = self.source == "text" or self.bos == "document"
        _check(fine, "data.bos", "'document' with source='backcopy'", self.bos)
        # numpy's and grain's seeds have no sign; grain's has 32 bits.
        _check(0 <= self.seed < 2**32, "data.seed", "0 to 2**32 - 1", self.seed)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move.

    Args:
      name: "adamw"; "muon" (matrices of the blocks and embedding projections by Muon, the rest by
        AdamW); or "orthoadam" (AdamW in a random basis for every parameter).
      learning_rate: peak of the schedule.
      adam_learning_rate: peak for what Muon leaves to AdamW; None means `learning_rate`.
      schedule: what follows the warm-up: down to `final_fraction` of the peak, or nothing;
        wsd goes down at the end only.
      warmup_steps: steps of linear warm-up from 0.
      final_fraction: last learning rate over the peak (cosine, linear and wsd).
      decay_fraction: share of all steps in which wsd goes down.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      epsilon: added to Adam's denominator.
      weight_decay: decoupled, multiplied by the learning rate.
      no_decay: regular expressions over parameter paths that do not decay. With () everything
        decays: in the two-layer byte model at weight decay 0.3 that made the sink stronger (attention
        to BOS in layer 0 after 2,000 steps .18 and .26 for seeds 0 and 1, against .06 and .23).
      clip_norm: largest global gradient norm; None does not clip.
      accumulation_steps: microbatches one step is cut into.
      loss_chunks: parts in which each device goes through the logits of its tokens, so that they are
        never there whole (`sinkjax.ops.head_cross_entropy`); 1 is all at once, None as few as keep a
        part under 1 GiB of float32.
      z_loss: weight of the squared log-partition.
      muon_beta: decay of Muon's momentum.
      muon_consistent_rms: update RMS that Muon is scaled to, 0.2 being AdamW's (arXiv 2502.16982),
        so that one learning rate serves both; None scales by the shape instead.
      muon_embeddings: Muon on the embedding table and the head too, instead of AdamW.
      rotation_seed: of OrthoAdam's bases.
      rotation_block_size: coordinates of one axis that OrthoAdam mixes; 1 is AdamW.
    """

    name: Literal["adamw", "muon", "orthoadam"] = "adamw"
    learning_rate: float = 3e-3
    adam_learning_rate: float | None = None
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = NO_DECAY
    clip_norm: float | None = 1.0
    accumulation_steps: int = 1
    loss_chunks: int | None = None
    z_loss: float = 0.0
    muon_beta: float = 0.95
    muon_consistent_rms: float | None = 0.2
    muon_embeddings: bool = False
    rotation_seed: int = 0
    rotation_block_size: int = 256

    def __post_init__(self) -> None:
        names, schedules = ("adamw", "muon", "orthoadam"), ("constant", "cosine", "linear", "wsd")
        _check(self.name in names, "optimizer.name", f"one of {names}", self.name)
        _check(
            self.schedule in schedules,
            "optimizer.schedule",
            f"one of {schedules}",
            self.schedule,
        )
        for field in ("learning_rate", "epsilon", "adam_learning_rate", "clip_norm"):
            value = getattr(self, field)
            _check(value is None or value > 0, f"optimizer.{field}", "more than 0", value)
        for field in ("warmup_steps", "final_fraction", "weight_decay", "z_loss"):
            value = getattr(self, field)
            _check(value >= 0, f"optimizer.{field}", "at least 0", value)
        for field in ("beta1", "beta2", "muon_beta"):
            value = getattr(self, field)
            _check(0 <= value < 1, f"optimizer.{field}", "0 <= value < 1", value)
        for field in ("accumulation_steps", "rotation_block_size", "loss_chunks"):
            value = getattr(self, field)
            _check(value is None or value >= 1, f"optimizer.{field}", "at least 1", value)
        fraction = self.decay_fraction
        _check(0 <= fraction <= 1, "optimizer.decay_fraction", "0 to 1", fraction)
        _check(self.rotation_seed >= 0, "optimizer.rotation_seed", "at least 0", self.rotation_seed)
        # A switch that does nothing would be believed.
        fine = self.name == "muon" or not self.muon_embeddings
        _check(fine, "optimizer.muon_embeddings", f"False with name={self.name!r}", True)


@dataclasses.dataclass(frozen=True)
class PenaltyConfig:
    """Weights of the auxiliary losses (`sinkjax.ops.penalties`); at 0 nothing is computed.

    Args:
      hidden_z_loss: of the squared log-sum-exp of the last layer's magnitudes; 1e-7 is published.
      tweo: of the fourth power of all blocks' outputs over 3; 0.01 is published.
      decorrelation: of the squared cosine with the first token of the text; 1e4 is published, for
        fine-tuning.
      load_balancing: of the uneven use of experts (`sinkjax.ops.moe`); 0.01 is published.
      router_z_loss: of the squared log-sum-exp of the router's logits; 0.001 is published.
    """

    hidden_z_loss: float = 0.0
    tweo: float = 0.0
    decorrelation: float = 0.0
    load_balancing: float = 0.0
    router_z_loss: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(value >= 0, f"penalties.{field.name}", "at least 0", value)

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by name."""
        return {name: weight for name, weight in dataclasses.asdict(self).items() if weight}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run: model, data, optimiser, mesh, and how long.

    Args:
      model: shape of the decoder; rows of data are its `context_length` long.
      data: what it reads.
      optimizer: how it learns.
      penalties: auxiliary losses that are added.
      mesh: on which devices.
      path: the run folder: `config.json`, `metrics.jsonl`, `checkpoints/<step>`.
      steps: optimiser steps.
      seed: seed of the initial parameters.
      log_every: steps between lines of training loss.
      eval_every: steps between evaluations (also at step 0 and at the end).
      eval_batches: validation batches of one evaluation.
      checkpoint_every: steps between checkpoints (also at the end).
      keep_checkpoints: newest checkpoints that are kept.
      sink_epsilon: threshold of the sink rate (Gu et al., arXiv 2410.10781, use 0.3).
    """

    model: DecoderConfig = dataclasses.field(default_factory=lambda: preset("tiny"))
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    penalties: PenaltyConfig = PenaltyConfig()
    mesh: MeshConfig = MeshConfig()
    path: str = "runs/train"
    steps: int = 2000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    sink_epsilon: float = 0.3

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "eval_every", "eval_batches", "checkpoint_every")
        for field in (*counts, "keep_checkpoints"):
            value = getattr(self, field)
            _check(value >= 1, field, "at least 1", value)
        _check(0 <= self.seed < 2**32, "seed", "0 to 2**32 - 1", self.seed)
        _check(self.path != "", "path", "a folder", self.path)
        rows, parts = self.data.batch_size, self.optimizer.accumulation_steps
        _check(rows % parts == 0, "data.batch_size", f"a multiple of {parts} microbatches", rows)
        weight, layers = self.penalties.decorrelation, self.model.num_layers
        fine = weight == 0 or layers >= 2
        _check(fine, "penalties.decorrelation", f"0 with model.num_layers={layers}", weight)
        for name in ROUTER_PENALTIES:
            weight = getattr(self.penalties, name)
            fine = weight == 0 or self.model.num_experts > 0
            _check(fine, f"penalties.{name}", "0 with model.num_experts=0", weight)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names of the fields in which two configs of one class differ, with both values."""
    found = []
    for field in dataclasses.fields(old):
        name, a, b = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found += differences(a, b, name + ".")
        elif a != b:
            found.append((name, a, b))
    return found
