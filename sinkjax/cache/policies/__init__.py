"""Which tokens a cache keeps: pure functions of what it holds and of what its queries looked for.

    evidence             what a policy may look at: `Evidence`; what it must answer: `Policy`
    protect              tokens that are kept whatever their score
    keep                 from scores, protected tokens and a budget to the slots that stay
    order                slots in the order of the text
    streaming            `StreamingLLM`: what is recent
    accumulated          `H2O`, `ObservedAttention`, `VATP`: what has drawn attention so far
    tova                 `TOVA`: what the last query looks at
    snapkv               `SnapKV`: what the last queries agree on; PyramidKV with `budgets.Pyramid`
    expected_attention   `ExpectedAttention`: what queries yet to come are expected to look at
    knorm                `Knorm`: small keys
    keydiff              `KeyDiff`: keys that point elsewhere than most
    lagkv                `LagKV`: what differs most from the text that follows it
    random               `Random`: the baseline
    simlayer             which layers need only sinks and a window: `local_mass`, `lazy_layers`

How many tokens a layer or a head keeps is in `cache.budgets`.

Letters: B batch, K key/value heads, S tokens held, N query heads, w last queries, H head size.
"""

from sinkjax.cache.policies.evidence import Evidence as Evidence
from sinkjax.cache.policies.evidence import Policy as Policy
from sinkjax.cache.policies.protect import protect as protect
from sinkjax.cache.policies.keep import keep as keep
from sinkjax.cache.policies.keep import weakest as weakest

from sinkjax.cache.policies.streaming import StreamingLLM as StreamingLLM
from sinkjax.cache.policies.accumulated import H2O as H2O
from sinkjax.cache.policies.accumulated import ObservedAttention as ObservedAttention
from sinkjax.cache.policies.accumulated import VATP as VATP
from sinkjax.cache.policies.tova import TOVA as TOVA
from sinkjax.cache.policies.snapkv import SnapKV as SnapKV
from sinkjax.cache.policies.expected_attention import ExpectedAttention as ExpectedAttention
from sinkjax.cache.policies.knorm import Knorm as Knorm
from sinkjax.cache.policies.keydiff import KeyDiff as KeyDiff
from sinkjax.cache.policies.lagkv import LagKV as LagKV
from sinkjax.cache.policies.random import Random as Random

from sinkjax.cache.policies.simlayer import local_mass as local_mass
from sinkjax.cache.policies.simlayer import lazy_layers as lazy_layers
