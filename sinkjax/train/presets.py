"""Published pre-training settings, as data: which optimiser, which penalties, which model fields.

A preset holds what its source states about the optimiser and the fields of the model in which it
differs from a plain decoder; sizes, data and length stay the run's. What a source does not state is
the default of `OptimizerConfig`.
"""

import dataclasses
from typing import Any

from sinkjax.train.config import OptimizerConfig, PenaltyConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class TrainPreset:
    """One published setting.

    Args:
      source: where it is stated, and what of it is our reading.
      optimizer: how the parameters move.
      penalties: auxiliary losses.
      model: fields of `DecoderConfig` in which it differs from a plain decoder.
      steps: steps of the source's run, where the setting is about them.
      published: what the source measured: `sink_rate` is Sink_1 at epsilon 0.3 as a share, `loss` in
        nats per token, `kurtosis` the excess kurtosis of OSP. For its model and data, not yours.
    """

    source: str
    optimizer: OptimizerConfig = OptimizerConfig()
    penalties: PenaltyConfig = PenaltyConfig()
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    published: dict[str, float] = dataclasses.field(default_factory=dict)

    def apply(self, run: RunConfig) -> RunConfig:
        """The run under this setting; its sizes, data, steps and microbatches stay."""
        parts = run.optimizer.accumulation_steps
        return dataclasses.replace(
            run,
            model=dataclasses.replace(run.model, **self.model),
            optimizer=dataclasses.replace(self.optimizer, accumulation_steps=parts),
            penalties=self.penalties,
        )


# --- When attention sinks emerge: Gu et al.

_GU = (
    "Gu et al., arXiv:2410.10781, 60M model, 5B tokens, 20k steps. The rate is constant, as in the "
    "released configuration (its minimum is its peak); the paper says cosine"
)
_GU_OPTIMIZER = OptimizerConfig(
    learning_rate=4e-4,
    schedule="constant",
    warmup_steps=100,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    clip_norm=1.0,
)

GU_LEARNING_RATES: tuple[tuple[float, int, float, float | None], ...] = (
    (8e-4, 20_000, 0.3223, 3.70),
    (4e-4, 20_000, 0.1818, 3.73),
    (2e-4, 20_000, 0.1121, 3.78),
    (1e-4, 20_000, 0.0290, 3.92),
    (8e-4, 10_000, 0.2344, None),
    (2e-4, 40_000, 0.1681, None),
    (1e-4, 80_000, 0.0629, None),
)
"""The study's learning rates: (peak, steps, sink rate, validation loss where stated)."""

GU_WEIGHT_DECAYS: tuple[tuple[float, float, float | None], ...] = (
    (0.0, 0.1520, None),
    (0.001, 0.1539, None),
    (0.01, 0.1523, None),
    (0.1, 0.1818, 3.73),
    (0.5, 0.4108, 3.80),
    (1.0, 0.3771, 3.90),
    (2.0, 0.0613, 4.23),
    (5.0, 0.0001, 5.24),
)
"""The study's weight decays at 20,000 steps: (decay, sink rate, validation loss where stated)."""


def _gu(sink_rate: float, loss: float | None, steps: int = 20_000, **changes: Any) -> TrainPreset:
    published = {"sink_rate": sink_rate} | ({} if loss is None else {"loss": loss})
    optimizer = dataclasses.replace(_GU_OPTIMIZER, **changes)
    return TrainPreset(_GU, optimizer, steps=steps, published=published)


_EMERGENCE = {"gu": _gu(0.1818, 3.73)}
_EMERGENCE |= {
    f"gu, learning rate {rate:g}, {steps} steps": _gu(sink, loss, steps, learning_rate=rate)
    for rate, steps, sink, loss in GU_LEARNING_RATES
}
_EMERGENCE |= {
    f"gu, weight decay {decay:g}": _gu(sink, loss, weight_decay=decay)
    for decay, sink, loss in GU_WEIGHT_DECAYS
}


# --- Outlier-safe pre-training: Park et al.

_OSP = (
    "Park et al., arXiv:2506.19697 and dmis-lab/Outlier-Safe-Pre-Training, 1.4B model, 100B tokens. "
    "The schedule is SmolLM's, whose recipe they follow: constant, down to 0 in the last fifth"
)
_OSP_ADAM = OptimizerConfig(
    learning_rate=5e-4,
    schedule="wsd",
    decay_fraction=0.2,
    final_fraction=0.0,
    weight_decay=1e-2,
)
_OSP_MUON = dataclasses.replace(_OSP_ADAM, name="muon", muon_beta=0.95, muon_consistent_rms=0.2)
_SINGLE_SCALE, _PROJECTION = {"norm": "single_scale"}, {"embedding_projection": True}


def _osp(optimizer: OptimizerConfig, kurtosis: float, **model: Any) -> TrainPreset:
    return TrainPreset(_OSP, optimizer, model=model, published={"kurtosis": kurtosis})


_OUTLIERS = {
    # Embedding and head by AdamW, which the projections keep from the residual stream.
    "osp": _osp(_OSP_MUON, 0.04, **_SINGLE_SCALE, **_PROJECTION),
    "osp, adam": _osp(_OSP_ADAM, 1818.56),
    "osp, muon": _osp(_OSP_MUON, 1575.12),
    "osp, muon without adam": _osp(dataclasses.replace(_OSP_MUON, muon_embeddings=True), 361.35),
    "osp, muon, embedding projection": _osp(_OSP_MUON, 703.23, **_PROJECTION),
    "osp, muon, single scale": _osp(_OSP_MUON, 66.69, **_SINGLE_SCALE),
    "muon": TrainPreset(
        "Jordan, github.com/KellerJordan/Muon: 0.02 for hidden matrices, scaled by their shape, and "
        "AdamW at 3e-4 for the rest",
        OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=3e-4,
            weight_decay=0.01,
            muon_beta=0.95,
            muon_consistent_rms=None,
        ),
    ),
    "kaul": TrainPreset(
        "Kaul et al., arXiv:2410.17174: kurtosis 1657 to 3.1 by both together; softmax1 takes "
        "attention off the first token, OrthoAdam the outliers out of the activations",
        OptimizerConfig(name="orthoadam"),
        model={"normalizer": "softmax1"},
    ),
    "kaul, orthoadam": TrainPreset(
        "Kaul et al., arXiv:2410.17174, one half of it", OptimizerConfig(name="orthoadam")
    ),
    "longcat": TrainPreset(
        "LongCat-Flash, arXiv:2509.01322: hidden z-loss 1e-7, Adam's epsilon 1e-16",
        OptimizerConfig(epsilon=1e-16),
        PenaltyConfig(hidden_z_loss=1e-7),
    ),
    "tweo": TrainPreset("Liang et al., arXiv:2511.23225", penalties=PenaltyConfig(tweo=0.01)),
}

PRESETS: dict[str, TrainPreset] = _EMERGENCE | _OUTLIERS
"""Settings by name."""


def train_preset(name: str) -> TrainPreset:
    """The published setting called `name`.

    >>> train_preset("osp").model
    {'norm': 'single_scale', 'embedding_projection': True}

    Raises:
      ValueError: there is none; lists the choices.
    """
    if name not in PRESETS:
        raise ValueError(f"recipe: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
