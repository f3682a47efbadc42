"""A run, a text and a cache from flags."""

import numpy as np
import pytest

from sinkjax.cache import SinkWindow
from sinkjax.cli.entry import parse
from sinkjax.cli.options import CacheOptions, open_run


def test_the_window_is_what_the_context_leaves():
    assert CacheOptions().description(19) == SinkWindow(4, 15, "cache_relative")
    given = CacheOptions(num_sink_tokens=2, window=7, position_mode="absolute")
    assert given.description(19) == SinkWindow(2, 7, "absolute")
    words = ["--sink-tokens", "auto", "--max-sink-tokens", "3"]
    found = parse(CacheOptions, words, "sinkjax").description(19)
    assert found == SinkWindow("auto", 16, "cache_relative", 3)
    with pytest.raises(ValueError, match="num-sink-tokens: .*context length 19, got 19"):
        CacheOptions(num_sink_tokens=19).description(19)
    with pytest.raises(ValueError, match="window: expected .* at least 1, got 0"):
        CacheOptions(window=0).description(19)


def test_a_text_is_the_files_or_what_the_run_held_out(trained, text, tmp_path):
    run = open_run(trained.folder)
    assert run.lead == (256,)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"\xffone")
    second.write_bytes(b"two")
    assert bytes(run.text([str(second), str(first)]).tolist()) == b"\xffonetwo"
    held_out = bytes(run.text([]).tolist())
    assert held_out in [file.read_bytes() for file in text.iterdir()]  # one of seven files
    assert run.text([]).dtype == np.int32
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=r"files: expected text, .*a\.txt: empty"):
        run.text([str(first)])
