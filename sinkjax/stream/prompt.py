"""From a prompt to the tokens that are fed: what leads it, and what of it fits."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

from sinkjax.cache import Cache
from sinkjax.typing import TextEncoder

Overlength: TypeAlias = Literal["chunk", "truncate_middle", "error"]
OVERLENGTH: tuple[Overlength, ...] = get_args(Overlength)


def learned_sink_ids(model: Any) -> tuple[int, ...]:
    """Ids that lead every stream of a model and are never drawn."""
    return tuple(getattr(getattr(model, "config", None), "learned_sink_ids", ()))


def to_feed(
    model: Any,
    prompt: str | Sequence[int],
    tokenizer: TextEncoder | None,
    *,
    bos: bool,
    position: int,
    pending: int | None,
) -> list[int]:
    """Ids of a prompt behind what is pending, or at the start behind learned sink tokens and BOS.

    Args:
        model: its config names the learned sink tokens and the size of the vocabulary.
        prompt: text (needs `tokenizer`) or ids; may be empty.
        tokenizer: gives the ids of a text, and BOS.
        bos: whether BOS leads a stream.
        position, pending: of the session.

    Raises:
        ValueError: a text without tokenizer, ids that the model does not have, or nothing to feed.
    """
    if isinstance(prompt, str):
        if prompt and tokenizer is None:
            raise ValueError("prompt: a text needs tokenizer=, got none; or give a sequence of ids")
        prompt = tokenizer.encode(prompt) if prompt and tokenizer is not None else ()
    tokens = [int(i) for i in prompt]
    if pending is not None:
        tokens = [pending, *tokens]
    elif position == 0:
        first = [tokenizer.bos_id] if bos and tokenizer is not None else []
        lead = [*learned_sink_ids(model), *first]
        if tokens[: len(lead)] != lead:
            begins = first != [] and tokens[:1] == first
            tokens = [*lead, *tokens[1:]] if begins else [*lead, *tokens]
    if not tokens:
        raise ValueError("prompt: expected at least one token (no tokenizer gives a BOS), got none")
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None:
        wrong = [token for token in tokens if not 0 <= token < size]
        if wrong:
            raise ValueError(f"prompt: expected ids of 0 to {size - 1}, got {wrong[0]}")
    return tokens


def fit(
    tokens: list[int], cache: Cache, position: int, overlength: Overlength
) -> tuple[list[int], int]:
    """What of a prompt is fed, and how many tokens are dropped.

    A prompt is too long with more tokens than the cache has slots, C (with more than are left of a
    `Full` cache). Then ``"chunk"`` feeds all of it, chunk by chunk: exact, the cache evicts as
    always. ``"truncate_middle"`` feeds its first ⌈C/2⌉ and last ⌊C/2⌋ tokens, side by side.
    ``"error"`` refuses.

    Raises:
        ValueError: an unknown policy, or a prompt that is refused; names both lengths.

    Source: from the middle, since instructions stand at either end: Bai et al. 2023 (LongBench),
    arXiv 2308.14508, §4.1.
    """
    if overlength not in OVERLENGTH:
        raise ValueError(f"overlength: expected one of {', '.join(OVERLENGTH)}, got {overlength!r}")
    room = cache.capacity if cache.limit is None else cache.limit - position
    if overlength == "chunk" or len(tokens) <= room:
        return tokens, 0
    if overlength == "error" or room < 1:
        raise ValueError(
            f"prompt: expected at most the {room} tokens that the cache has room for, "
            f"got {len(tokens)}; overlength='chunk' reads all of a prompt, evicting as it goes"
        )
    tail = room // 2
    return tokens[: room - tail] + tokens[len(tokens) - tail :], len(tokens) - room
