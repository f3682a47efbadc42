"""Batches of packed rows: global batch n is a pure function of (corpus, seed, n).

A batch is a dictionary of int32 arrays [B, T]: `tokens`; `targets`, the next token of the same
segment; `positions`, from 0 in every segment; `segment_ids`, from 1, 0 being padding; `loss_mask`,
1 where the target is text. A segment is the learned sink tokens, if any, then BOS (`DataConfig.bos`),
then a piece of one document. The last token of a piece is only a target, so every token of a document
is a target exactly once. With neither sink tokens nor BOS a piece begins with the last token of the
one before, and every token but the first of the document is a target exactly once.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from sinkjax.sharding import batch_sharding, row_sharding
from sinkjax.train.config import DataConfig
from sinkjax.train.corpus import Documents, read_documents
from sinkjax.train.tasks import VOCAB_SIZE, Backcopy
from sinkjax.train.tokenizer import load_tokenizer

Batch = dict[str, np.ndarray]
# A `grain.MapDataset` of batches. Grain types every element as possibly None, ours never are.
BatchDataset = Any

# More batches than any run makes, and small enough for grain's 64-bit arithmetic.
_ENDLESS = 2**40


@runtime_checkable
class Rows(Protocol):
    """Random access to rows; `rows(indices)` builds them when they are asked for."""

    def rows(self, indices: np.ndarray) -> Batch: ...


class PackedRows:
    """Documents cut into pieces and packed into rows of T tokens.

    The packing is an index of a few integers per segment, made here once; rows are built lazily.
    A document longer than a row fills rows of its own; remainders and short documents share rows,
    each row taking the longest piece that is left and then, again and again, the longest that
    still fits.

    Args:
      documents: token ids.
      length: T.
      bos_id: id that leads every segment, after the sink tokens; None for none.
      sink_ids: learned sink tokens, before every BOS.

    Raises:
      ValueError: no room for text beside the sink tokens, or no text that has a target.
    """

    def __init__(
        self, documents: Documents, length: int, bos_id: int | None, sink_ids: tuple[int, ...] = ()
    ):
        self.prefix = np.asarray((*sink_ids, *(() if bos_id is None else (bos_id,))), np.int32)
        # Without a prefix the first token of a piece has nothing before it that could predict it.
        self.context = int(len(self.prefix) == 0)
        # The last token of a piece is a target only, so a piece with m targets takes m slots, and
        # all of the prefix but one on top.
        extra = len(self.prefix) - 1 + self.context
        room = length - extra
        if room < 1:
            raise ValueError(
                f"context_length: expected more than the {len(sink_ids)} learned sink tokens, "
                f"got {length}"
            )
        self.documents = documents
        self.length = length
        lengths = np.maximum(np.diff(documents.offsets) - self.context, 0)
        if not lengths.any():
            raise ValueError("documents: expected some of 2 tokens or more without BOS, got none")
        full = lengths // room
        owner = np.repeat(np.arange(len(documents)), full)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(full) - full, full)
        starts = documents.offsets[owner] + within * room
        rest = np.flatnonzero(lengths % room)
        rest_starts = documents.offsets[rest] + full[rest] * room
        shared = _pack(lengths[rest] % room, length, extra)
        # Segment table: where each piece starts and how many targets it has; row i has segments
        # first[i]:first[i + 1].
        order = np.concatenate([np.zeros(0, np.int64), *shared]).astype(np.int64)
        self.start = np.concatenate([starts, rest_starts[order]])
        self.size = np.concatenate([np.full(len(starts), room), (lengths[rest] % room)[order]])
        counts = np.concatenate([np.ones(len(starts)), [len(row) for row in shared]])
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.first) - 1

    def rows(self, indices: np.ndarray) -> Batch:
        """Batch of the rows `indices` [B], see the module's docstring."""
        names = ("tokens", "targets", "positions", "segment_ids", "loss_mask")
        batch = {name: np.zeros((len(indices), self.length), np.int32) for name in names}
        P = max(len(self.prefix) - 1, 0)
        for b, row in enumerate(indices):
            begin = 0
            for number, s in enumerate(range(self.first[row], self.first[row + 1]), start=1):
                last = self.start[s] + self.context + self.size[s]
                piece = self.documents.tokens[self.start[s] : last]
                segment = np.concatenate([self.prefix, piece])
                end = begin + len(segment) - 1
                batch["tokens"][b, begin:end] = segment[:-1]
                batch["targets"][b, begin:end] = segment[1:]
                batch["positions"][b, begin:end] = np.arange(end - begin)
                batch["segment_ids"][b, begin:end] = number
                batch["loss_mask"][b, begin + P : end] = 1
                begin = end
        return batch


def _pack(sizes: np.ndarray, length: int, extra: int) -> list[list[int]]:
    # Indices by size; `available` holds the sizes that are left, ascending.
    by_size: dict[int, list[int]] = {}
    for index in reversed(range(len(sizes))):
        by_size.setdefault(int(sizes[index]), []).append(index)
    available = sorted(by_size)
    rows = []
    while available:
        row, gap = [], length
        while (place := bisect_right(available, gap - extra)) > 0:
            size = available[place - 1]
            row.append(by_size[size].pop())
            gap -= size + extra
            if not by_size[size]:
                available.pop(place - 1)
        rows.append(row)
    return rows


class Batches:
    """Random-access sequence of this process's part of every global batch.

    Args:
      rows: where rows come from.
      order: global row number → index into `rows`; None is the identity.
      batch_size: B over all processes.
      local: which of the B rows are built here.
    """

    def __init__(
        self,
        rows: Rows,
        order: grain.MapDataset | None,
        batch_size: int,
        local: Sequence[int],
    ):
        self._rows, self._order, self._batch_size = rows, order, batch_size
        self._local = np.asarray(local, np.int64)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch:
        numbers = int(index) * self._batch_size + self._local
        if self._order is not None:
            numbers = np.asarray([self._order[int(i)] for i in numbers])
        return self._rows.rows(numbers)

    def __repr__(self) -> str:
        return f"Batches({type(self._rows).__name__}, batch_size={self._batch_size})"


def batches(
    rows: Rows, batch_size: int, seed: int, local: Sequence[int] | None = None
) -> BatchDataset:
    """Endless dataset of batches; element n is the same whatever came before it.

    Args:
      rows: `PackedRows`, shuffled anew in every epoch, or an endless source.
      batch_size: B over all processes.
      seed: of the shuffle.
      local: which of the B rows to build, from 0, for a process that holds only these
        (`local_rows`); None builds all.

    Returns:
      `grain.MapDataset` of those rows of each batch.

    Raises:
      ValueError: a row is not in the batch.
    """
    local = range(batch_size) if local is None else local
    if len(local) and not (0 <= min(local) and max(local) < batch_size):
        raise ValueError(
            f"local: expected rows from 0 to {batch_size - 1}, got {min(local)} to {max(local)}"
        )
    order = None
    if isinstance(rows, PackedRows):
        order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    return grain.MapDataset.source(Batches(rows, order, batch_size, local))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Rows of a batch that devices of this process hold, ascending; some may be on others too.

    Raises:
      ValueError: the mesh has no device of this process.
    """
    held = row_sharding(mesh).addressable_devices_indices_map((batch_size,))
    if not held:
        raise ValueError(
            "mesh: expected devices of every process, "
            f"got none of process {jax.process_index()} in {dict(mesh.shape)}"
        )
    rows = [range(batch_size)[index[0]] for index in held.values() if index is not None]
    return tuple(sorted({number for part in rows for number in part}))


def place(batch: Batch, rows: Sequence[int], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch on the devices of a mesh; every process brings the rows its devices hold.

    Args:
      batch: the rows `rows`, each array [len(rows), T].
      rows: as of `local_rows`.
      batch_size: B.
      mesh: where to.

    Returns:
      Arrays [B, T] laid out as `batch_sharding` says.
    """
    sharding = batch_sharding(mesh)
    at = {number: position for position, number in enumerate(rows)}

    def put(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            mine = [at[number] for number in range(batch_size)[index[0]]]
            return array[mine][:, *index[1:]]

        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: put(array) for name, array in batch.items()}


def iterate(dataset: BatchDataset) -> grain.DatasetIterator:
    """Iterator whose state is one number, with two batches made ahead in a thread."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return dataset.to_iter_dataset(options).__iter__()


def load_data(
    config: DataConfig,
    context_length: int,
    vocab_size: int,
    num_learned_sink_tokens: int = 0,
    local: Sequence[int] | None = None,
) -> tuple[BatchDataset, BatchDataset]:
    """Training and validation batches of a run.

    Args:
      config: what to read.
      context_length: T, tokens of a row.
      vocab_size: of the model; must hold the tokenizer's ids and the learned sink tokens.
      num_learned_sink_tokens: the last ids of the model's vocabulary.
      local: which rows of each batch to build, see `batches`.

    Returns:
      Training dataset, validation dataset; see `batches`.

    Raises:
      ValueError: the vocabulary is too small, or the data cannot be read.
    """
    if config.source == "backcopy":
        if num_learned_sink_tokens:
            raise ValueError(
                "model.num_learned_sink_tokens: expected 0 with data.source='backcopy', whose rows "
                f"hold none, got {num_learned_sink_tokens}"
            )
        _check_vocabulary(vocab_size, VOCAB_SIZE, 0)
        # Another seed is another stream of rows, so nothing need be held out by index.
        seeds = config.seed, config.seed + 2**32
        train, validation = (Backcopy(context_length, seed) for seed in seeds)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        _check_vocabulary(vocab_size, tokenizer.vocab_size, num_learned_sink_tokens)
        sink_ids = tuple(range(vocab_size - num_learned_sink_tokens, vocab_size))
        bos_id = tokenizer.bos_id if config.bos == "document" else None
        train, validation = (
            PackedRows(documents, context_length, bos_id, sink_ids)
            for documents in read_documents(
                config.files,
                tokenizer,
                validation_fraction=config.validation_fraction,
                max_bytes=config.max_bytes,
            )
        )
    return (
        batches(train, config.batch_size, config.seed, local),
        batches(validation, config.batch_size, config.seed, local),
    )


def _check_vocabulary(vocab_size: int, tokenizer: int, learned: int) -> None:
    if vocab_size < tokenizer + learned:
        raise ValueError(
            f"model.vocab_size: expected at least {tokenizer} ids of the data and {learned} "
            f"learned sink tokens, got {vocab_size}"
        )
