from collections.abc import Iterator
from typing import Any, cast

import jaxtyping
import pytest

from sinkjax.cache import Full, LayerSpec, SinkWindow


@pytest.fixture
def untyped() -> Iterator[None]:
    """The suite's type checks off, as for a user: they would speak before the ValueError."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SinkWindow(4, 0), "SinkWindow.window: expected an integer of at least 1, got 0"),
        (lambda: SinkWindow(-1, 8), "SinkWindow.num_sink_tokens: .* at least 0, got -1"),
        (
            lambda: SinkWindow(4, 8, cast(Any, "relative")),
            "expected one of cache_relative, absolute",
        ),
        (lambda: Full(0), "Full.length: expected an integer of at least 1, got 0"),
        (lambda: LayerSpec(2, 4, window=0), "LayerSpec.window"),
        (lambda: LayerSpec(2, 4, num_sink_tokens=-1), "LayerSpec.num_sink_tokens"),
        (lambda: LayerSpec(0, 4), "LayerSpec.num_kv_heads"),
    ],
)
def test_impossible_values(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_capacity():
    assert SinkWindow().capacity == 1024
    assert SinkWindow(0, 5).capacity == 5
    assert Full(9).capacity == 9


def test_a_layer_keeps_its_own_mask_where_it_fits():
    cache = SinkWindow(4, 20)
    assert cache.store(LayerSpec(2, 8)).capacity == 24
    own = cache.store(LayerSpec(2, 8, window=20, num_sink_tokens=1))
    assert (own.sink_slots, own.ring_slots, own.window, own.num_sink_tokens) == (1, 20, 20, 1)
    cut = cache.store(LayerSpec(2, 8, window=21, num_sink_tokens=1))
    assert (cut.sink_slots, cut.ring_slots, cut.window, cut.num_sink_tokens) == (4, 20, 20, 4)


def test_sinks_are_held_at_the_distance_of_the_description():
    assert SinkWindow(4, 20).store(LayerSpec(2, 8, window=3)).position_cap == 23
    assert SinkWindow(4, 20, "absolute").store(LayerSpec(2, 8)).position_cap is None
    # more trained sink tokens than the description has: all of them before the query
    assert SinkWindow(0, 8).store(LayerSpec(2, 8, window=8, num_sink_tokens=5)).position_cap == 12


def test_a_full_cache_never_needs_more_than_its_length():
    assert Full(9).store(LayerSpec(2, 8, window=5, num_sink_tokens=2)).capacity == 7
    assert Full(9).store(LayerSpec(2, 8, window=8, num_sink_tokens=2)).capacity == 9
    assert Full(9).store(LayerSpec(2, 8, window=50)).window is None
