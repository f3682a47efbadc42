"""Every shard takes all keys and computes its own queries: right for any mask, O(S) memory."""

import dataclasses
from typing import Any

import jax

from sinkjax.ops.sequence.shift import AXIS
from sinkjax_kernels.varying import alike


def gather(attend, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    """`attend(arrays, static)` of whole rows; keys that came whole stay as they are."""
    visibility, T = arrays["visibility"], arrays["query"].shape[1]
    arrays = arrays | {name: _whole(arrays[name], 1) for name in ("key", "value")}
    for name in ("bias", "mask"):  # [b, n, t, s]; those of own queries have all their keys
        if arrays[name] is not None and arrays[name].shape[2] == 1:
            arrays[name] = _whole(arrays[name], 3)
    lengths = visibility.query_lengths
    if lengths is not None:
        lengths = lengths - jax.lax.axis_index(AXIS) * T
    visibility = dataclasses.replace(
        visibility,
        key_positions=_whole(visibility.key_positions, 2),
        key_segment_ids=_whole(visibility.key_segment_ids, 1),
        key_is_sink=_whole(visibility.key_is_sink, 2),
        query_lengths=lengths,
        query_start=None,  # another one on each shard
        same_segments=False,
    )
    return attend(alike(arrays | {"visibility": visibility}), static)


def _whole(x, axis: int):
    """All shards' parts of an array, where it is cut."""
    if x is None or AXIS not in jax.typeof(x).manual_axis_type.varying:
        return x
    return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)
