"""KV caches as pytrees of constant size.

    descriptions   what to keep: `SinkWindow`, `Full`; what a layer was trained with: `LayerSpec`
    state          the arrays: `Cache`, made by `create`
    ring           which slot a position lives in
    attend         attention of a chunk on a layer's cache, exact for every cut of the stream

Letters: B batch, T chunk length, N query heads, K key/value heads, H head size, P sink tokens,
W window, C = P + W slots. Leaves are `[B, K, C, H]`.
"""

from sinkjax.cache.attend import attend as attend
from sinkjax.cache.descriptions import Description as Description
from sinkjax.cache.descriptions import Full as Full
from sinkjax.cache.descriptions import LayerSpec as LayerSpec
from sinkjax.cache.descriptions import PositionMode as PositionMode
from sinkjax.cache.descriptions import SinkWindow as SinkWindow
from sinkjax.cache.state import Cache as Cache
from sinkjax.cache.state import LayerState as LayerState
from sinkjax.cache.state import LayerView as LayerView
from sinkjax.cache.state import create as create
