"""What several commands ask for: a run, a text, the shape of a cache."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from sinkjax.cache import PositionMode, SinkWindow
from sinkjax.models import Decoder, load
from sinkjax.strict_json import from_json
from sinkjax.train.config import RunConfig
from sinkjax.train.corpus import find_files, read_documents
from sinkjax.train.tokenizer import load_tokenizer
from sinkjax.typing import Tokenizer

_SINKS = tyro.conf.arg(aliases=["--sink-tokens"])


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """The cache: the first tokens of the stream and the last ones, of constant size.

    Args:
      num_sink_tokens: first tokens that are kept for ever; auto: sinks found anywhere in the prompt.
      max_sink_tokens: most sinks that auto keeps.
      window: last tokens that are kept; None: what the context length leaves beside the sinks.
      position_mode: cache_relative: no distance exceeds the cache, which must fit the context
        length, and a stream may be endless. absolute: positions in the text, good for as many
        tokens as the context length.
    """

    num_sink_tokens: Annotated[int | Literal["auto"], _SINKS] = 4
    max_sink_tokens: int = 4
    window: int | None = None
    position_mode: PositionMode = "cache_relative"

    def description(self, context_length: int) -> SinkWindow:
        """The cache for a model of this context length, in tokens.

        Raises:
          ValueError: fewer sink tokens than none, a window below 1, or sinks that fill the context.
        """
        sinks, window = self.num_sink_tokens, self.window
        if sinks == "auto":
            sinks = self.max_sink_tokens
        if window is None:
            window = context_length - sinks
            if window < 1:
                raise ValueError(
                    f"num-sink-tokens: expected fewer than the context length {context_length}, "
                    f"got {sinks}"
                )
        return SinkWindow(self.num_sink_tokens, window, self.position_mode, self.max_sink_tokens)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that is there: its newest model, its config, and the tokenizer it was trained with."""

    model: Decoder
    config: RunConfig
    tokenizer: Tokenizer

    @property
    def lead(self) -> tuple[int, ...]:
        """Ids before every text: learned sink tokens, then BOS where it was trained with one."""
        bos = (self.tokenizer.bos_id,) if self.has_bos else ()
        return (*self.config.model.learned_sink_ids, *bos)

    @property
    def has_bos(self) -> bool:
        """Whether the texts that it was trained on were led by BOS."""
        return self.config.data.bos == "document"

    def text(self, files: Sequence[str]) -> np.ndarray:
        """Ids of the files one after the other, or of what the run held out if there are none.

        Raises:
          ValueError: a file is missing, unreadable, or all are empty.
        """
        data = self.config.data
        if not files:
            _, held_out = read_documents(
                data.files,
                self.tokenizer,
                validation_fraction=data.validation_fraction,
                max_bytes=data.max_bytes,
            )
            return held_out.tokens.astype(np.int32)
        try:
            root, names = find_files(files)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("data.")) from error
        ids = [self.tokenizer.encode_bytes((root / name).read_bytes()) for name in names]
        if not sum(map(len, ids)):
            raise ValueError(f"files: expected text, {', '.join(files)}: empty")
        return np.concatenate(ids)


def open_run(run: str) -> Trained:
    """The run in a folder.

    Raises:
      ValueError: no run is there, its checkpoint does not fit its config (names the first
        parameter that differs), or it was trained on something that is no text.
    """
    model, _ = load(Path(run).absolute())
    file = Path(run) / "config.json"
    config = from_json(RunConfig, file.read_text(encoding="utf-8"), name=str(file))
    if config.data.source != "text":
        raise ValueError(
            f"run: expected a model of text, {run} was trained on data.source={config.data.source}"
        )
    return Trained(model, config, load_tokenizer(config.data.tokenizer))
