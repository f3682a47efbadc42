"""The figures that a report shows, as far as what was measured allows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sinkjax.diagnose.plots.attention import attention_maps
from sinkjax.diagnose.plots.layers import (
    importance_by_position,
    massive_activations,
    norms_over_layers,
    sink_map,
)


def of_report(
    report: Any, weights: Any = None, tokens: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Figures of a report, by caption.

    Args:
        report: what `analyze` returned.
        weights: [L, N, T, S] attention of one sample (`capture(...).weights[:, 0]`), if wanted.
        tokens: text of that sample's tokens.
    Returns:
        Caption -> figure, in the order of the page.
    """
    arrays: Mapping[str, np.ndarray] = report.arrays
    figures: dict[str, Figure] = {}
    settings = report.metadata["settings"]
    if "importance" in arrays:
        figures["Importance of the examined token, by layer and head"] = sink_map(
            arrays["importance"],
            epsilon=settings["epsilon"],
            num_tokens=settings["sink_tokens"] if settings["position"] == 0 else None,
        )
    if weights is not None:
        figures["Attention maps of the first sequence"] = attention_maps(
            np.asarray(weights), tokens, title="Attention maps of the first sequence"
        )
    if "importance_by_position" in arrays:
        figures["Importance of every position"] = importance_by_position(
            arrays["importance_by_position"]
        )
    if "residual_norm" in arrays:
        figures["Norms over layers"] = norms_over_layers(
            residual=arrays["residual_norm"].reshape(-1, 2),
            key=arrays["key_norm"],
            value=arrays["value_norm"],
        )
    if "activation_top" in arrays:
        figures["Largest activations over depth"] = massive_activations(
            arrays["activation_top"].reshape(-1, 3), arrays["activation_median"].reshape(-1)
        )
    return figures
