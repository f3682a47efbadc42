"""Attention of rows whose tokens are cut over the mesh axis `sequence`.

    plan      which of the strategies serves a call, and why
    halo      window: the last keys of the neighbours, and the sink tokens carried from where they are
    carry     the exclusive scan over shards that carries them
    ring      all keys before a query: keys travel, partial results are merged, the sink is added once
    rectangle blocks of the ring in which every query sees every key
    gather    everything else: every device holds all keys
    shift     from each shard to one on its right

Each strategy runs inside `jax.shard_map`, on arrays of which each device has its own tokens.
"""

from sinkjax.ops.sequence.gather import gather
from sinkjax.ops.sequence.halo import halo
from sinkjax.ops.sequence.plan import Plan as Plan
from sinkjax.ops.sequence.plan import plan as plan
from sinkjax.ops.sequence.plan import tell as tell
from sinkjax.ops.sequence.ring import ring

STRATEGIES = {"halo": halo, "ring": ring, "gather": gather}
"""By name: functions of an attention function, the operands of a call and its static options."""
