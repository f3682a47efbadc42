"""Passkeys in a haystack: texts whose last tokens can be told only by looking far back."""

import dataclasses

import numpy as np
from jaxtyping import Int

from sinkjax.typing import TextEncoder

NATO = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar "
    "papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
).split()
"""What passkeys in text are made of, as in DuoAttention's data."""

ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()

NUM_LENGTHS = 50
"""Lengths between the shortest row and the longest; DuoAttention's data has 50 as well."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passkeys:
    r"""Rows of the passkey task, in any vocabulary.

    prefix · haystack with `intro[i]` · passkey i · `outro` at random depths · question ·
    `answer[0]` · passkey 0 · `answer[1]` · passkey 1 …

    The passkeys in the answer are the only targets that count. A head that is needed to copy them
    has to see past any window, so this is the text that tells retrieval heads from the others.

    Args:
        haystack: [n] ids; every row takes a piece from a random place, going round at the end.
        length: T, tokens of a row.
        words: what passkeys are made of: ids of each word.
        intro, answer: ids before passkey i in the haystack and in the answer; as many of the one as
            of the other.
        question: ids between the haystack and the answer.
        prefix: ids that lead the row: BOS.
        outro: ids after a passkey in the haystack.
        words_per_passkey: drawn uniformly, with replacement.
        depths: between which shares of the haystack passkeys lie.
        min_length: the length of a row is drawn from 50 even steps between this and T, the rest is
            padding; None: all rows have T tokens.
        seed: row i is a pure function of (seed, i).

    Raises:
        ValueError: names the field; also a row too short for its passkeys.

    Source: Xiao et al. 2024 (DuoAttention), arXiv 2410.10819, and its code: 10 passkeys of 32 NATO
        words at depths 0.05 to 0.95. There the questions count too, and each stands before its
        answer; the wording of `text_passkeys` is our own.
    """

    haystack: np.ndarray
    length: int
    words: tuple[tuple[int, ...], ...]
    intro: tuple[tuple[int, ...], ...]
    answer: tuple[tuple[int, ...], ...]
    question: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    outro: tuple[int, ...] = ()
    words_per_passkey: int = 32
    depths: tuple[float, float] = (0.05, 0.95)
    min_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if np.ndim(self.haystack) != 1 or len(self.haystack) == 0:
            raise ValueError(f"haystack: expected ids [n], got shape {np.shape(self.haystack)}")
        if len(self.intro) != len(self.answer) or not self.intro:
            raise ValueError(
                f"intro, answer: expected one of each per passkey, got {len(self.intro)} and "
                f"{len(self.answer)}"
            )
        if not self.words or not all(self.words):
            raise ValueError(f"words: expected ids for each of some words, got {self.words}")
        if self.words_per_passkey < 1:
            raise ValueError(
                f"words_per_passkey: expected at least 1, got {self.words_per_passkey}"
            )
        low, high = self.depths
        if not 0 <= low <= high <= 1:
            raise ValueError(f"depths: expected 0 <= low <= high <= 1, got {self.depths}")
        shortest = self.length if self.min_length is None else self.min_length
        needed = self._most_besides_haystack + 1
        if not needed <= shortest + 1 <= self.length + 1:
            name = "length" if self.min_length is None else "min_length"
            raise ValueError(
                f"{name}: expected from {needed - 1} tokens (passkeys, question and answer) to "
                f"length={self.length}, got {shortest}"
            )

    @property
    def _most_besides_haystack(self) -> int:
        longest = self.words_per_passkey * max(map(len, self.words))
        parts = (self.prefix, self.question, *self.intro, *self.answer)
        count = len(self.intro)
        return sum(map(len, parts)) + count * (2 * longest + len(self.outro))

    def rows(self, indices: np.ndarray) -> dict[str, Int[np.ndarray, "B T"]]:
        """Batch of the rows `indices`.

        Args:
            indices: integers [B].

        Returns:
            int32 arrays [B, T]: the batch dictionary of `sinkjax.train.data`; `loss_mask` is 1 where
            the *target* belongs to a passkey of the answer.
        """
        names = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
        batch = {name: np.zeros((len(indices), self.length), np.int32) for name in names}
        for b, index in enumerate(indices):
            ids, counts = self._row(np.random.default_rng((self.seed, int(index))))
            end = len(ids) - 1
            batch["tokens"][b, :end] = ids[:-1]
            batch["targets"][b, :end] = ids[1:]
            batch["positions"][b, :end] = np.arange(end)
            batch["segment_ids"][b, :end] = 1
            batch["loss_mask"][b, :end] = counts[1:]
        return batch

    def _row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a row and its last target, and which of them are passkeys of the answer."""
        length = self.length
        if self.min_length is not None:
            lengths = np.linspace(self.min_length, self.length, NUM_LENGTHS).round().astype(int)
            length = int(random.choice(lengths))
        drawn = random.integers(len(self.words), size=(len(self.intro), self.words_per_passkey))
        keys = [sum((self.words[word] for word in row), ()) for row in drawn]
        hidden = [a + key + self.outro for a, key in zip(self.intro, keys, strict=True)]
        answers = [
            part for pair in zip(self.answer, keys, strict=True) for part in pair
        ]  # what leads to a passkey, the passkey, ...
        tail = [self.question, *answers]
        free = length + 1 - sum(map(len, [self.prefix, *hidden, *tail]))
        start = random.integers(len(self.haystack))
        hay = np.take(self.haystack, np.arange(start, start + free), mode="wrap")
        places = np.round(random.uniform(*self.depths, len(hidden)) * free).astype(int)
        parts, last = [self.prefix], 0
        for i in np.argsort(places, kind="stable"):
            parts += [hay[last : places[i]], hidden[i]]
            last = places[i]
        parts += [hay[last:], *tail]
        counts = [np.zeros(len(part), np.int32) for part in parts]
        for part in counts[len(counts) - len(answers) + 1 :: 2]:
            part[:] = 1
        return np.concatenate(parts).astype(np.int32), np.concatenate(counts)


def text_passkeys(
    tokenizer: TextEncoder,
    haystack: str | Int[np.ndarray, " n"],
    length: int,
    *,
    num_passkeys: int = 10,
    words_per_passkey: int = 32,
    prefix: tuple[int, ...] | None = None,
    min_length: int | None = None,
    seed: int = 0,
) -> Passkeys:
    """The task in English, for a model of text.

    Args:
        tokenizer: `encode(text) -> ids` without BOS, and its `bos_id`.
        haystack: a long text that says nothing of passkeys, or its ids.
        length, words_per_passkey, min_length, seed: of `Passkeys`.
        num_passkeys: at most 10.
        prefix: what leads a row; None: BOS.

    Raises:
        ValueError: more passkeys than ordinals, or as `Passkeys`.
    """
    if not 1 <= num_passkeys <= len(ORDINALS):
        raise ValueError(f"num_passkeys: expected 1 to {len(ORDINALS)}, got {num_passkeys}")

    def ids(text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in tokenizer.encode(text))

    if prefix is None:
        prefix = (int(tokenizer.bos_id),)
    ordinals = ORDINALS[:num_passkeys]
    return Passkeys(
        haystack=np.asarray(ids(haystack) if isinstance(haystack, str) else haystack),
        length=length,
        words=tuple(ids(f" {word}") for word in NATO),
        intro=tuple(ids(f"\nNote well: the {name} passkey of the vault is") for name in ordinals),
        outro=ids(".\n"),
        question=ids("\nWhat are the passkeys of the vault?"),
        answer=tuple(ids(f"\nThe {name} passkey of the vault is") for name in ordinals),
        prefix=prefix,
        words_per_passkey=words_per_passkey,
        min_length=min_length,
        seed=seed,
    )


def toy_passkeys(
    length: int,
    *,
    num_passkeys: int = 3,
    num_words: int = 16,
    num_fillers: int = 16,
    words_per_passkey: int = 1,
    seed: int = 0,
) -> Passkeys:
    """The task over a few symbols, for a model of that task alone.

    Ids: 0 leads the row, 1 a passkey in the haystack, 2 is the question, 3 leads a passkey in the
    answer; then `num_passkeys` names of passkeys, then the words, then the fillers of the haystack.
    The vocabulary is `4 + num_passkeys + num_words + num_fillers` ids.

    Args:
        length, words_per_passkey, seed: of `Passkeys`.
        num_passkeys, num_words, num_fillers: sizes of the three groups of ids.
    """
    names = range(4, 4 + num_passkeys)
    words = range(names.stop, names.stop + num_words)
    # Drawn apart from the rows: one haystack, of which each row takes a piece.
    haystack = words.stop + np.random.default_rng((seed,)).integers(num_fillers, size=8 * length)
    return Passkeys(
        haystack=haystack,
        length=length,
        words=tuple((word,) for word in words),
        intro=tuple((1, name) for name in names),
        answer=tuple((3, name) for name in names),
        question=(2,),
        prefix=(0,),
        words_per_passkey=words_per_passkey,
        seed=seed,
    )
