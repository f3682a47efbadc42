"""Which way attention over tokens cut across devices is computed, from what is known of the call."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

logger = logging.getLogger("sinkjax")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call runs on a mesh that cuts its tokens.

    Args:
        strategy: "halo", "ring" or "gather"; "whole" where every device computes whole rows.
        reason: why this one.
    """

    strategy: Literal["whole", "halo", "ring", "gather"]
    reason: str


def plan(arrays: Mapping[str, Any], static: Mapping[str, Any], shards: int) -> Plan:
    """The cheapest strategy that is right.

    Args:
        arrays: checked operands of `dot_product_attention` by name, or shapes in their place.
        static: its static options.
        shards: devices along `sequence`.
    """
    T, v = arrays["query"].shape[1], arrays["visibility"]
    if shards == 1:
        return Plan("whole", "no mesh axis `sequence` cuts the tokens")
    if T % shards:
        return Plan("whole", f"{T} queries do not divide by {shards} shards")
    reason = _irregular(arrays)
    if reason:
        return Plan("gather", reason)
    own = T // shards
    if v.is_causal and v.left is not None and v.left < T - own:
        return Plan("halo", f"causal, and a window of {v.left + 1} keys")
    if (v.left is not None and v.left < T - 1) or (not v.is_causal and v.right is not None):
        return Plan("gather", "a window that reaches every shard, or later keys")
    if not static["normalizer"].has_log_sum_exp:
        return Plan("gather", f"{static['normalizer']} has no log-sum-exp to merge partial rows by")
    if "normalizer_params" in arrays:
        return Plan("gather", "a normalizer with learned leaves")
    if v.is_causal and own % 2:
        return Plan("gather", f"{own} tokens per shard are no two chunks of equal size")
    return Plan("ring", "every key before a query" if v.is_causal else "every key")


def _irregular(arrays: Mapping[str, Any]) -> str | None:
    """What of a mask is more than a causal or full one over consecutive tokens, or None."""
    v, bias = arrays["visibility"], arrays["bias"]
    T, S = arrays["query"].shape[1], arrays["key"].shape[1]
    irregular = {
        "queries that are not those of the keys": T != S,
        "positions that are not known to be consecutive": None in (v.query_start, v.key_start),
        "positions of queries that are not those of the keys": v.query_start != v.key_start,
        "segment ids of queries that are not those of the keys": v.query_segment_ids is not None
        and not v.same_segments,
        "sink tokens by an array": v.num_sink_tokens is None,
        "sequence lengths": v.query_lengths is not None or v.key_lengths is not None,
        "a mask array": arrays["mask"] is not None,
        "a bias that is not the same for all queries": bias is not None
        and (bias.shape[2] > 1 or bias.shape[3] == 1),
    }
    return next((name for name, found in irregular.items() if found), None)


def tell(plan: Plan) -> None:
    """Says once of each reason that a call does without a strategy whose memory is that of a shard."""
    if plan.strategy in ("whole", "gather") and plan.reason not in _told:
        _told.add(plan.reason)
        means = "takes all keys" if plan.strategy == "gather" else "computes whole rows"
        logger.warning("attention: each device along `sequence` %s: %s", means, plan.reason)


_told: set[str] = set()
