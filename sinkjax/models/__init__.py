"""Models: a decoder, its config, presets and storage. Every model returns `Output`."""

from sinkjax.models.config import DecoderConfig as DecoderConfig
from sinkjax.models.decoder import Decoder as Decoder
from sinkjax.models.merge import merge_embedding_projection as merge_embedding_projection
from sinkjax.models.output import Output as Output
from sinkjax.models.parameters import abstract as abstract
from sinkjax.models.parameters import check_shapes as check_shapes
from sinkjax.models.parameters import count as count
from sinkjax.models.parameters import from_parameters as from_parameters
from sinkjax.models.parameters import parameters as parameters
from sinkjax.models.parameters import unroll as unroll
from sinkjax.models.presets import PRESETS as PRESETS
from sinkjax.models.presets import preset as preset
from sinkjax.models.storage import config_from_json as config_from_json
from sinkjax.models.storage import config_to_json as config_to_json
from sinkjax.models.storage import load as load
