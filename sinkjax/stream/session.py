"""The state of one stream, and its file: what is saved continues as if it had never stopped."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sinkjax.cache import Cache, Description, LayerSpec, create, on_host
from sinkjax.files import open_whole
from sinkjax.stream.described import from_plain, plain
from sinkjax.stream.state import Stream
from sinkjax.stream.structure import empty_cache
from sinkjax.stream.trim import trim

FORMAT = 2


@dataclasses.dataclass
class Session(Stream):
    """Everything a stream of one row remembers, of constant size.

    Args:
        cache: of one row.
        seed, position, pending, tail, dropped: see `Stream`.
    """

    cache: Cache

    @classmethod
    def start(cls, model: Any, description: Description, *, seed: int = 0) -> "Session":
        """A new stream through `model` that keeps what `description` says."""
        return cls(empty_cache(model, description, 1), seed=seed)

    def fork(self) -> "Session":
        """An independent copy: both continue from here."""
        return dataclasses.replace(self, cache=jax.tree.map(jnp.copy, self.cache))

    def trim(self, count: int) -> None:
        """Undo the last `count` tokens of the stream, the pending one first.

        What follows is drawn as if they had never been there. Possible as long as all that the
        coming token may look at is still in the cache, see `sinkjax.stream.trim`.

        Raises:
            ValueError: something would be missing, or there are not as many tokens; nothing changes.
        """
        drawn = 0 if self.pending is None else 1
        if not 0 <= count <= self.position + drawn:
            raise ValueError(
                f"count: expected 0 to the {self.position + drawn} tokens of the stream, "
                f"got {count}"
            )
        read = max(count - drawn, 0)
        self.cache = trim(self.cache, read)
        self.position -= read
        if count > 0:
            self.pending = None
            self.tail = self.tail[:-count]

    def check(self, model: Any) -> None:
        """Refuse a model that this session's cache was not made for.

        Raises:
            ValueError: names the first array that differs.
        """
        want = jax.eval_shape(lambda: model.init_cache(self.cache.description, 1))
        if len(want.layers) != len(self.cache.layers):
            raise ValueError(
                f"cache: the model has {len(want.layers)} layers, "
                f"the cache {len(self.cache.layers)}"
            )
        have = dict(jax.tree_util.tree_leaves_with_path(self.cache))
        for path, leaf in jax.tree_util.tree_leaves_with_path(want):
            got = have.get(path)
            if got is None or (got.shape, got.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(
                    f"cache: the model needs {jax.tree_util.keystr(path)} of {leaf.dtype} "
                    f"{leaf.shape}, got {None if got is None else f'{got.dtype} {got.shape}'}"
                )
        if want.specs != self.cache.specs:
            raise ValueError(
                f"cache: the model's layers are {want.specs}, the cache was made for "
                f"{self.cache.specs}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to one file (npz), whole or not at all.

        Where several processes have parts of the cache, all of them must call it, and each writes all
        of it: the same path on a shared disk will do.

        Raises:
            OSError: the file cannot be written; an older one under the name is untouched.
        """
        cache = self.cache
        head = {
            "format": FORMAT,
            "description": plain(cache.description),
            "specs": [dataclasses.asdict(spec) for spec in cache.specs],
            "context_length": cache.context_length,
            "dtype": cache.dtype,
            "seed": self.seed,
            "position": self.position,
            "pending": self.pending,
            "tail": list(self.tail),
            "dropped": self.dropped,
        }
        arrays: dict[str, Any] = {
            f"leaf{index}": _raw(on_host(leaf)) for index, leaf in enumerate(jax.tree.leaves(cache))
        }
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with open_whole(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, descriptions: Sequence[type] = ()) -> "Session":
        """The session in a file written by `save`.

        Args:
            path: of the file.
            descriptions: classes of the cache's description that are not sinkjax's own.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a session, one of another format, or of a description that is
                not known.
        """
        try:
            with open(path, "rb") as handle:  # numpy leaks the handle of a file cut short
                file = np.load(handle, allow_pickle=False)
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise ValueError("one array")
                arrays = {name: file[name] for name in file.files}
            head = json.loads(arrays.pop("head").tobytes())
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"path: {path} is not a saved session ({error})") from error
        if head.get("format") != FORMAT:
            raise ValueError(
                f"path: {path} has session format {head.get('format')}, expected {FORMAT}"
            )
        description = from_plain(head["description"], descriptions)
        specs = [LayerSpec(**spec) for spec in head["specs"]]
        # The model's length comes after: what `create` says of it was said at the start.
        template = jax.eval_shape(lambda: create(description, specs, 1, dtype=head["dtype"]))
        template = dataclasses.replace(template, context_length=head["context_length"])
        leaves, structure = jax.tree.flatten(template)
        restored = []
        for index, leaf in enumerate(leaves):
            array = arrays.get(f"leaf{index}")
            if array is None or array.shape != leaf.shape:
                raise ValueError(f"path: {path} is not a saved session (leaf {index} is missing)")
            restored.append(jnp.asarray(array.view(leaf.dtype)))
        return cls(
            jax.tree.unflatten(structure, restored),
            seed=head["seed"],
            position=head["position"],
            pending=head["pending"],
            tail=tuple(head["tail"]),
            dropped=head["dropped"],
        )


def _raw(array: np.ndarray) -> np.ndarray:
    """What is not numpy's own (bfloat16, int4) as its bits: npz files know no other types."""
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
