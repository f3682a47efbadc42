"""Adaptation: what is found or changed after training.

Which heads retrieve and which only stream: `train_head_gates` learns it on passkeys, `outside_mass`
reads it off the attention; `sinkjax.cache.head_plan.HeadPlan` is what comes out.
"""

# Data
from sinkjax.adapt.passkeys import Passkeys as Passkeys
from sinkjax.adapt.passkeys import text_passkeys as text_passkeys
from sinkjax.adapt.passkeys import toy_passkeys as toy_passkeys

# Head classes
from sinkjax.adapt.head_classes import outside_mass as outside_mass
from sinkjax.adapt.head_classes import streaming_config as streaming_config
from sinkjax.adapt.head_gates import HeadGateConfig as HeadGateConfig
from sinkjax.adapt.head_gates import HeadGates as HeadGates
from sinkjax.adapt.head_gates import train_head_gates as train_head_gates
from sinkjax.cache.head_plan import HeadPlan as HeadPlan
