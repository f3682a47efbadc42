"""Figures. Every function returns a matplotlib `Figure` and touches no global state.

Save one with `figure.savefig("picture.png", dpi=150)`; no display is needed.
"""

from sinkjax.diagnose.plots.attention import attention_maps as attention_maps
from sinkjax.diagnose.plots.attention import sink_variants as sink_variants
from sinkjax.diagnose.plots.attention import what_a_sink_is as what_a_sink_is
from sinkjax.diagnose.plots.cache import of_caches as of_caches
from sinkjax.diagnose.plots.layers import importance_by_position as importance_by_position
from sinkjax.diagnose.plots.layers import massive_activations as massive_activations
from sinkjax.diagnose.plots.layers import norms_over_layers as norms_over_layers
from sinkjax.diagnose.plots.layers import sink_map as sink_map
from sinkjax.diagnose.plots.standard import of_report as of_report
from sinkjax.diagnose.plots.training import over_steps as over_steps
