"""The choice among settings of kernels that are compiled together and scored apart."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

LEAST_GAIN = 0.005  # of a score near 1: for less a setting stays as it is

Settings = dict[str, Any]
Scores = Mapping[str, float]  # by part, a kernel for example; less is better


def fewest(found: Mapping[Any, Scores]) -> dict[str, Any]:
    """What has the least score of each part, the first of equals."""
    parts = dict.fromkeys(part for scores in found.values() for part in scores)
    return {
        part: min((x for x in found if part in found[x]), key=lambda x: found[x][part])
        for part in parts
    }


def descend(
    starts: Mapping[str, Settings],
    turns: Sequence[Mapping[str, Sequence[Any]]],
    parts: Mapping[str, Sequence[str]],
    score: Callable[[dict[str, list[Settings]]], Mapping[str, Sequence[Scores]]],
    rounds: int = 3,
) -> dict[str, Settings]:
    """Settings of each chip that no change of one field improves by `LEAST_GAIN`, or those after `rounds`.

    Args:
        starts: by chip.
        turns: fields that are changed at the same time, each with the values to try; fields of a turn
            belong to different parts, so that one trial tells about a value of each.
        parts: the fields that decide the score of each part.
        score: of lists of settings by chip, the scores of each; empty where nothing can be said because
            one of the parts failed.
    """
    at = {chip: dict(settings) for chip, settings in starts.items()}
    known: dict[Hashable, float] = {}

    def key(chip: str, part: str, settings: Settings) -> Hashable:
        return chip, part, tuple(settings[field] for field in parts[part])

    def learn(trials: dict[str, list[Settings]]) -> None:
        new = {
            chip: [x for x in some if any(key(chip, part, x) not in known for part in parts)]
            for chip, some in trials.items()
        }
        new = {chip: some for chip, some in new.items() if some}
        again: dict[str, list[Settings]] = {}
        for chip, found in (score(new) if new else {}).items():
            for settings, scores in zip(new[chip], found, strict=True):
                apart = [at[chip] | {f: settings[f] for f in fields} for fields in parts.values()]
                if not scores and settings not in apart:  # some part failed: which one?
                    again.setdefault(chip, []).extend(apart)
                for part in parts if scores or settings in apart else ():
                    known.setdefault(key(chip, part, settings), scores.get(part, math.inf))
        if again:
            learn(again)

    def best(chip: str, field: str, values: Sequence[Any]) -> Any:
        mine = [part for part, fields in parts.items() if field in fields]
        now = at[chip][field]
        total = {
            value: {field: sum(known[key(chip, part, at[chip] | {field: value})] for part in mine)}
            for value in dict.fromkeys((now, *values))
        }
        found = fewest(total)[field]
        gain = total[now][field] - total[found][field]
        return found if gain > LEAST_GAIN * len(mine) else now

    learn({chip: [settings] for chip, settings in at.items()})
    for _ in range(rounds):
        before = dict(at)
        for turn in turns:
            learn({chip: list(_trials(settings, turn)) for chip, settings in at.items()})
            for chip in at:
                at[chip] = at[chip] | {f: best(chip, f, values) for f, values in turn.items()}
        if at == before:
            break
    return at


def _trials(settings: Settings, turn: Mapping[str, Sequence[Any]]) -> Iterator[Settings]:
    """The settings with other values of the fields of a turn, as few as show each value once."""
    others = ([(f, x) for x in values if x != settings[f]] for f, values in turn.items())
    for changes in itertools.zip_longest(*others):
        yield settings | dict(change for change in changes if change)
