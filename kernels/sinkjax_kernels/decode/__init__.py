"""A few queries against a ring cache whose first slots hold the sink tokens."""

from sinkjax_kernels.decode.reference import Step as Step
from sinkjax_kernels.decode.reference import decode_attention as decode_attention
from sinkjax_kernels.decode.reference import decode_step as decode_step
