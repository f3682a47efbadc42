"""Steps of large models compiled for chips that are not there: what fits, what is sent, how fast.

job          what is planned; `topology`: slices of chips by name
steps        the real training and decode step, on shapes alone
compile      the TPU's compiler in a process of its own (`child`)
hlo          the optimised program as text; `loops`: how often its parts run
collectives  what is sent; `work`: what is computed and moved; `buffers`: what is largest
floors       seconds at least; `report`: the answer; `table`: for people
"""

from sinkjax.plan.compile import compile_step as compile_step
from sinkjax.plan.job import Job as Job
from sinkjax.plan.job import Ring as Ring
from sinkjax.plan.job import decode_mesh as decode_mesh
from sinkjax.plan.report import Plan as Plan
from sinkjax.plan.report import plan as plan
from sinkjax.plan.report import report as report
from sinkjax.plan.topology import Topology as Topology
