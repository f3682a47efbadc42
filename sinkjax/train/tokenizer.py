"""Text to ids and back: bytes with one BOS, or a file of the Hugging Face `tokenizers` library."""

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from sinkjax.typing import StreamDecoder, Tokenizer

# Names under which released tokenizers keep their beginning-of-text token, in the order they are tried.
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]")


class ByteTokenizer:
    """The 256 bytes and a BOS: ids 0 to 255 are UTF-8 bytes, id 256 is BOS.

    Needs no file, no training and no vocabulary, and the smallest sink-bearing models are
    trained on it (BOS is what the sink grows on).

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né").tolist()
    [110, 195, 169]
    >>> tokenizer.decode([256, 110, 195, 169])
    'né'
    """

    bos_id: int = 256
    vocab_size: int = 257

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of `text` as int32 ids, without BOS."""
        return self.encode_bytes(text.encode("utf-8"))

    def encode_bytes(self, content: bytes) -> np.ndarray:
        """The bytes themselves as int32 ids, without BOS; also of content that is not UTF-8."""
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids`; BOS and learned sink tokens (ids of 256 and up) have no text."""
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder: a character comes out with the last of its bytes."""
        return _ByteStreamDecoder()


class _ByteStreamDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if 0 <= token < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    BOS is the first of `BOS_NAMES` that the file knows; a file that knows none of them gets one
    new id behind its own.

    Args:
      path: a `tokenizer.json`.

    Raises:
      ImportError: the `tokenizers` library is not installed (extra `hf`).
      ValueError: the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "a tokenizer file needs the `tokenizers` library: pip install 'sinkjax[hf]'"
            ) from error
        if not Path(path).is_file():
            raise ValueError(
                f"tokenizer: expected 'bytes' or a tokenizer.json file, got {str(path)!r}"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file it cannot read
            raise ValueError(f"tokenizer: {path} is not a tokenizer.json file ({error})") from error
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        known = (self._tokenizer.token_to_id(name) for name in BOS_NAMES)
        self.bos_id: int = next((i for i in known if i is not None), size)
        self.vocab_size: int = max(size, self.bos_id + 1)
        self._file_size = size

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text` as int32, without BOS or any other special token."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_bytes(self, content: bytes) -> np.ndarray:
        """Ids of UTF-8 content; bytes that are not UTF-8 become the replacement character."""
        return self.encode(content.decode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids`; special tokens and ids that the file does not know have no text."""
        known = [int(i) for i in ids if 0 <= int(i) < self._file_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A fresh incremental decoder: text comes out once later ids can no longer change it."""
        return _FileStreamDecoder(self)


class _FileStreamDecoder:
    # Many decoders look at neighbours (leading space, bytes of one character), so an id has no
    # text of its own: keep the ids since the last clean boundary and hand out what was added.
    def __init__(self, tokenizer: FileTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._prefix):
            return ""
        added = text[len(self._prefix) :]
        self._ids = self._ids[-1:]
        self._prefix = self._tokenizer.decode(self._ids)
        return added

    def flush(self) -> str:
        added = self._tokenizer.decode(self._ids)[len(self._prefix) :]
        self._ids, self._prefix = [], ""
        return added


def load_tokenizer(name: str) -> Tokenizer:
    """`"bytes"` gives the `ByteTokenizer`, anything else is the path of a `tokenizer.json`.

    Args:
      name: `"bytes"` or a path.

    Returns:
      The tokenizer.

    Raises:
      ImportError: a path is given and the extra `hf` is not installed.
      ValueError: the path is not a tokenizer file.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)
