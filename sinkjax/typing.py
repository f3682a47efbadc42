"""The letters of the shapes, and names for what crosses most borders: arrays and tokenizers.

One letter per dimension, the same in annotations, einsum strings and names of local variables:

    B  batch              D  model width
    T  query length       F  feed-forward width
    S  key length         V  vocabulary
    N  query heads        L  layers
    K  key/value heads    P  sink tokens
    G  = N / K            W  window, in keys, the query's own included
    H  head size          C  = P + W, cache slots

Activations are `[B, T, N, H]`, cache leaves `[B, K, C, H]`. A local variable may carry its shape as
a suffix (`q_BTNH`); public arguments have plain names and carry it in their annotation.
"""

from collections.abc import Iterable
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

Tokens: TypeAlias = Int[Array, "B T"]
"""Token ids."""

Positions: TypeAlias = Int[Array, "B T"]
"""Position of each token in its document or stream; -1 is padding."""

SegmentIds: TypeAlias = Int[Array, "B T"]
"""Which document of a packed row each token belongs to; 0 is padding."""

Hidden: TypeAlias = Float[Array, "B T D"]
"""The residual stream."""

Heads: TypeAlias = Float[Array, "B T N H"]
"""Queries, or the output of attention before its projection."""

KeyValueHeads: TypeAlias = Float[Array, "B S K H"]
"""Keys or values."""

Logits: TypeAlias = Float[Array, "B T V"]
"""Unnormalised log-probabilities of the next token."""


@runtime_checkable
class StreamDecoder(Protocol):
    """Turns ids that arrive one at a time into text that is never cut inside a character."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


@runtime_checkable
class TextEncoder(Protocol):
    """The part of a tokenizer that analysis needs; `encode` gives ids without BOS."""

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str) -> Any: ...


@runtime_checkable
class StreamTokenizer(TextEncoder, Protocol):
    """The part of a tokenizer that a stream needs."""

    def stream_decoder(self) -> StreamDecoder: ...


@runtime_checkable
class Tokenizer(StreamTokenizer, Protocol):
    """All of a tokenizer: what the data pipeline asks of it.

    `vocab_size` counts BOS and leaves out learned sink tokens: those are the last ids of the
    *model's* vocabulary and come after everything named here.
    """

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray: ...

    def encode_bytes(self, content: bytes) -> np.ndarray: ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str: ...
