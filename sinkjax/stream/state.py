"""What a stream remembers besides its cache."""

import dataclasses
from collections.abc import Sequence

TAIL = 16
"""Last tokens that a stream keeps for its text decoder; no character is longer."""


@dataclasses.dataclass(kw_only=True)
class Stream:
    """Where a stream stands. Token n is drawn with the key `fold_in(key(seed), n)`.

    Args:
        seed: of the sampler, all the randomness there is.
        position: tokens that the cache has taken.
        pending: the token that was drawn last and has not been given to the model, or None.
        tail: the last tokens of the stream, the pending one included, for the text decoder: a stop
            may cut a character.
        dropped: tokens of prompts that were left out, see `overlength` of `generate`.
    """

    seed: int = 0
    position: int = 0
    pending: int | None = None
    tail: tuple[int, ...] = ()
    dropped: int = 0

    def read(self, tokens: Sequence[int], dropped: int = 0) -> None:
        """The cache has taken these tokens, the pending one first."""
        new = tokens if self.pending is None else tokens[1:]
        self.tail = (*self.tail, *new[-TAIL:])[-TAIL:]
        self.position += len(tokens)
        self.pending = None
        self.dropped += dropped

    def drew(self, token: int) -> None:
        """This token was drawn."""
        self.tail = (*self.tail, token)[-TAIL:]
        self.pending = token
