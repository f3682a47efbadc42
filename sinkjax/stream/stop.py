"""Stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Hands a text on up to the first of some strings, which may be cut anywhere by the pieces.

    What could be the beginning of one is held back until it is clear.

    >>> stops = StopStrings(["END", "\\n\\n"])
    >>> stops.push("the E"), stops.push("N"), stops.push("Dless")
    (('the ', False), ('', False), ('', True))
    """

    def __init__(self, strings: Sequence[str]):
        if isinstance(strings, str) or not all(strings):
            raise ValueError(
                f"stop_strings: expected a sequence of texts, none of them empty, got {strings!r}"
            )
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What to hand on, and whether one of the strings is complete; it and the rest are lost."""
        held = self._held + text
        found = [at for at in (held.find(string) for string in self._strings) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, string) for string in self._strings), default=0)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut], False

    def flush(self) -> str:
        """What was held back, when no more is to come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a beginning of `string`, and not all of it."""
    most = min(len(text), len(string) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)
