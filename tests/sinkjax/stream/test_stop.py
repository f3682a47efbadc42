"""Stop strings: found wherever the pieces are cut, and nothing of them is handed on."""

import pytest

from sinkjax.stream.stop import StopStrings


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one two", [], ("one two", False)),
        ("one two", ["two"], ("one ", True)),
        ("aab aaab", ["aaab"], ("aab ", True)),  # a beginning that begins again
        ("ababac", ["abac"], ("ab", True)),
        ("the end is near", ["near", "end"], ("the ", True)),
        ("abc", ["bcd", "b"], ("a", True)),
        ("nearl", ["nearly"], ("nearl", False)),
        ("x", ["x"], ("", True)),
    ],
)
def test_every_cut_gives_the_text_before_the_first(text, stops, want):
    for size in range(1, len(text) + 1):
        finder, out = StopStrings(stops), ""
        for piece in (text[i : i + size] for i in range(0, len(text), size)):
            said, found = finder.push("".join(piece))
            out += said
            assert text.startswith(out)
            if found:
                break
        else:
            out, found = out + finder.flush(), False
        # A piece may complete two: the one that begins first counts.
        assert (out, found) == want, size


def test_bad_input():
    for stops in ([""], "stop"):
        with pytest.raises(ValueError, match="stop_strings: expected a sequence of texts"):
            StopStrings(stops)
