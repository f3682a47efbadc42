"""Sparse attention for long prompts: a pattern chooses blocks of keys, the rest is not computed.

    select            applies a pattern to queries and keys, which gives a `Selection`
    sparse_attention  attention on the chosen pairs, exact
    recall            how much of the dense attention they hold

Every pattern keeps the first block of keys, where the sink is, and the block of the query itself.
"""

# Patterns
from sinkjax.ops.sparse.pattern import Pattern as Pattern
from sinkjax.ops.sparse.a_shape import AShape as AShape
from sinkjax.ops.sparse.a_shape import TriShape as TriShape
from sinkjax.ops.sparse.vertical_slash import VerticalSlash as VerticalSlash
from sinkjax.ops.sparse.block_sparse import BlockSparse as BlockSparse
from sinkjax.ops.sparse.flex_prefill import FlexPrefill as FlexPrefill
from sinkjax.ops.sparse.x_attention import XAttention as XAttention

# What they choose, and attention on it
from sinkjax.ops.sparse.selection import Selection as Selection
from sinkjax.ops.sparse.pattern import select as select
from sinkjax.ops.sparse.attention import sparse_attention as sparse_attention
from sinkjax.ops.sparse.recall import recall as recall

# Pages, for decoding
from sinkjax.ops.sparse.pages import best_pages as best_pages
from sinkjax.ops.sparse.pages import page_bounds as page_bounds
