"""Training: one call trains a model and leaves a run folder that goes on where it stopped."""

# A run
from sinkjax.train.loop import Run as Run
from sinkjax.train.loop import fit as fit

# Several processes
from sinkjax.train.distributed import DistributedConfig as DistributedConfig
from sinkjax.train.distributed import joined as joined

# Config
from sinkjax.train.config import DataConfig as DataConfig
from sinkjax.train.config import MeshConfig as MeshConfig
from sinkjax.train.config import OptimizerConfig as OptimizerConfig
from sinkjax.train.config import PenaltyConfig as PenaltyConfig
from sinkjax.train.config import RunConfig as RunConfig
from sinkjax.strict_json import from_json as from_json
from sinkjax.strict_json import to_json as to_json

# Published settings
from sinkjax.train.presets import GU_LEARNING_RATES as GU_LEARNING_RATES
from sinkjax.train.presets import GU_WEIGHT_DECAYS as GU_WEIGHT_DECAYS
from sinkjax.train.presets import PRESETS as PRESETS
from sinkjax.train.presets import TrainPreset as TrainPreset
from sinkjax.train.presets import train_preset as train_preset

# Data
from sinkjax.train.data import load_data as load_data
from sinkjax.train.tasks import Backcopy as Backcopy
from sinkjax.train.tokenizer import ByteTokenizer as ByteTokenizer
from sinkjax.train.tokenizer import load_tokenizer as load_tokenizer
from sinkjax.typing import Tokenizer as Tokenizer

# The comparison of attention variants on Bigram-Backcopy
from sinkjax.train.backcopy import VARIANTS as VARIANTS
from sinkjax.train.backcopy import attention_to_bos as attention_to_bos
from sinkjax.train.backcopy import backcopy_run as backcopy_run
from sinkjax.train.backcopy import held_out_rows as held_out_rows

# Parts of the loop
from sinkjax.train.log import read_metrics as read_metrics
from sinkjax.train.optim import make_optimizer as make_optimizer
from sinkjax.train.optim import muon_parameters as muon_parameters
from sinkjax.train.orthoadam import scale_by_orthoadam as scale_by_orthoadam
from sinkjax.train.step import TrainState as TrainState
from sinkjax.train.step import init_state as init_state
from sinkjax.train.step import make_eval_step as make_eval_step
from sinkjax.train.step import make_train_step as make_train_step
