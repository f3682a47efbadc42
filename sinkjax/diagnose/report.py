"""The numbers of an analysis: a frozen record that prints as a table and goes to JSON and back."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sinkjax.diagnose.metrics import ENTRIES
from sinkjax.files import write_whole
from sinkjax.strict_json import plain


@dataclasses.dataclass(frozen=True)
class Report:
    """What `analyze` measured.

    Args:
        scalars: entry -> number.
        arrays: entry -> array; `axes(name)` names its axes, the first is the layer.
        metadata: model config, settings (epsilon, T, position), sizes, versions.
    """

    scalars: Mapping[str, float]
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name in self.scalars:
            return self.scalars[name]
        if name in self.arrays:
            return self.arrays[name]
        raise KeyError(f"{name!r} was not measured; have {[*self.scalars, *self.arrays]}")

    def __contains__(self, name: str) -> bool:
        return name in self.scalars or name in self.arrays

    @staticmethod
    def axes(name: str) -> str:
        """Axis names of an entry, such as "L N"; empty for a scalar."""
        return ENTRIES[name][0]

    @staticmethod
    def definition(name: str) -> str:
        """What an entry is, in one line."""
        return ENTRIES[name][1]

    @property
    def heading(self) -> str:
        """Everything that has to be named beside a sink number, in one line."""
        meta, settings = self.metadata, self.metadata["settings"]
        return (
            f"{meta['sequences']} sequences of {meta['tokens_per_sequence']} tokens; sinks at "
            f"position {settings['position']}, T={settings['sink_tokens']}, "
            f"ε={settings['epsilon']:g}, threshold per sample"
        )

    def by_layer(self) -> dict[str, np.ndarray]:
        """Columns [L] of the table over layers: entries, reduced over heads or half-blocks."""
        columns: dict[str, np.ndarray] = {}
        for name, title, reduce in _COLUMNS:
            if name in self.arrays:
                values = self.arrays[name]
                columns[title] = reduce(values.reshape(len(values), -1), axis=1)
        return columns

    def __str__(self) -> str:
        lines = [f"Attention sinks: {self.heading}", ""]
        width = max(map(len, self.scalars), default=0)
        for name, value in self.scalars.items():
            lines.append(f"  {name:<{width}}  {number(value):>9}  {self.definition(name)}")
        columns = self.by_layer()
        if columns:
            widths = [max(len(title), 8) for title in columns]
            heads = "  ".join(f"{t:>{w}}" for t, w in zip(columns, widths, strict=True))
            lines += ["", f"  layer  {heads}"]
            for layer, row in enumerate(zip(*columns.values(), strict=True)):
                cells = (f"{number(v):>{w}}" for v, w in zip(row, widths, strict=True))
                lines.append(f"  {layer:>5}  {'  '.join(cells)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON; numbers that are not finite become "inf", "-inf", "nan"."""
        return {
            "scalars": plain(self.scalars, not_finite=str),
            "arrays": plain(self.arrays, not_finite=str),
            "metadata": plain(self.metadata, not_finite=str),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; with a path it is also written there, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` described."""
        return cls(
            scalars={name: float(value) for name, value in data["scalars"].items()},
            arrays={name: np.array(value, np.float32) for name, value in data["arrays"].items()},
            metadata=data["metadata"],
        )


def number(value: Any) -> str:
    """A number for a table: about three decimals, an exponent only where they would say nothing."""
    value = float(value)
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.3f}" if size >= 0.01 else f"{value:.4f}"


def _last(values: np.ndarray, axis: int) -> np.ndarray:
    return values.take(-1, axis)


_COLUMNS = (
    ("importance", "α max", np.max),
    ("importance", "α mean", np.mean),
    ("sink_rate_by_head", "sink rate", np.mean),
    ("first_token_share_by_layer", "share", np.mean),
    ("sink_mass", "sink mass", np.mean),
    ("entropy_by_head", "entropy", np.mean),
    ("value_drain", "v drain", np.mean),
    ("key_norm_ratio", "k ratio", np.mean),
    ("residual_peak", "peak", _last),
    ("activation_psi", "Ψ", _last),
    ("kurtosis_bondarenko", "kurtosis", _last),
    ("anisotropy", "anisotropy", np.mean),
)
