"""KV caches as pytrees of constant size.

    descriptions   what to keep: `SinkWindow`, `Full`
    state          the arrays: `Cache`, made by `create`
    compose        a description per layer or per group of heads: `PerLayer`, `PerHead`
    scored         tokens that stay by score: `Scored`, with a policy and a budget; `compress`
    policies       which tokens are worth keeping; `budgets`: how many a layer or head gets
    quantised      older tokens in few bits: `Quantised`
    paged          everything kept, the best pages read: `PagedTopK`
    sparse_prefill everything kept, chunks that look at a part of it: `SparsePrefill`
    head_plan      which heads look far back, as JSON: `HeadPlan`
    attend         attention of a chunk on a layer's cache, exact for every cut of the stream
    layout         what lies where on a mesh, before a step and after it
    store          what every way to keep a layer promises; `LayerSpec`: what a layer was trained with
    ring           which slot a position lives in; `ring_store`: sinks and a window, or all of a text

Letters: B batch, T chunk length, N query heads, K key/value heads, H head size, P sink tokens,
W window, C = P + W slots. Leaves are `[B, K, C, H]`.
"""

from sinkjax.cache import policies as policies
from sinkjax.cache.attend import attend as attend
from sinkjax.cache.compose import PerHead as PerHead
from sinkjax.cache.compose import PerLayer as PerLayer
from sinkjax.cache.compress import compress as compress
from sinkjax.cache.descriptions import Description as Description
from sinkjax.cache.descriptions import Full as Full
from sinkjax.cache.descriptions import PositionMode as PositionMode
from sinkjax.cache.descriptions import SinkWindow as SinkWindow
from sinkjax.cache.head_plan import HeadPlan as HeadPlan
from sinkjax.cache.layout import keep_layout as keep_layout
from sinkjax.cache.layout import on_host as on_host
from sinkjax.cache.paged import PagedTopK as PagedTopK
from sinkjax.cache.quantised import Quantised as Quantised
from sinkjax.cache.ring_store import LayerState as LayerState
from sinkjax.cache.scored import Scored as Scored
from sinkjax.cache.sparse_prefill import SparsePrefill as SparsePrefill
from sinkjax.cache.state import Cache as Cache
from sinkjax.cache.state import create as create
from sinkjax.cache.store import LayerSpec as LayerSpec
from sinkjax.cache.store import LayerView as LayerView
