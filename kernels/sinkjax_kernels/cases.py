"""Named real shapes: tests, benchmarks and tuning speak of the same ones."""

import dataclasses

from sinkjax_kernels.flash.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention layer over one sequence, in bfloat16.

    Args:
        length: queries and keys.
        num_heads, num_kv_heads, head_dim: N, K and H.
        window: keys that a query sees back, itself included; None is plain causal attention.
        num_sink_tokens: first keys that stay visible.
        has_sinks: whether there is a sink logit per head.
    """

    name: str
    length: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    num_sink_tokens: int = 0
    has_sinks: bool = True

    @property
    def ranges(self) -> Ranges:
        return Ranges(self.window, self.num_sink_tokens)


CASES: tuple[Case, ...] = (
    Case("causal-8k", 8192),
    Case("causal-16k", 16384),
    Case("window-1024-8k", 8192, window=1024),
    Case("sink-window-8k", 8192, window=1024, num_sink_tokens=4),
    Case("sink-window-32k", 32768, window=1024, num_sink_tokens=4),
    Case("sink-window-131k", 131072, window=1024, num_sink_tokens=4),
    Case("sink-window-128-8k", 8192, window=128, num_sink_tokens=4),
    Case("sink-window-4096-8k", 8192, window=4096, num_sink_tokens=4),
    # N, K, H and window of the sliding layers of gpt-oss (OpenAI 2025), 20b and 120b alike.
    Case("gpt-oss-8k", 8192, num_heads=64, num_kv_heads=8, head_dim=64, window=128),
)


def case(name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    for known in CASES:
        if known.name == name:
            return known
    raise ValueError(f"case: expected one of {', '.join(c.name for c in CASES)}, got {name!r}")
