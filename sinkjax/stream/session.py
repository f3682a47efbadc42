"""The state of one stream, and its file: what is saved continues as if it had never stopped."""

import dataclasses
import json
import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sinkjax.cache import Cache, Full, LayerSpec, SinkWindow, create
from sinkjax.files import open_whole

FORMAT = 1
_DESCRIPTIONS = {"SinkWindow": SinkWindow, "Full": Full}


@dataclasses.dataclass
class Session:
    """Everything a stream of one row remembers, of constant size.

    Token n is drawn with the key `fold_in(key(seed), n)`: the seed is all the randomness there is.

    Args:
        cache: of one row.
        seed: of the sampler.
        position: tokens that the cache has taken.
        pending: the token that was drawn last and has not been given to the model, or None.
        tail: the last tokens that were drawn, for the text decoder: a stop may cut a character.
    """

    cache: Cache
    seed: int = 0
    position: int = 0
    pending: int | None = None
    tail: tuple[int, ...] = ()

    @classmethod
    def start(cls, model: Any, description: SinkWindow | Full, *, seed: int = 0) -> "Session":
        """A new stream through `model` that keeps what `description` says."""
        return cls(model.init_cache(description, 1), seed=seed)

    def fork(self) -> "Session":
        """An independent copy: both continue from here."""
        return dataclasses.replace(self, cache=jax.tree.map(jnp.copy, self.cache))

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

        Raises:
            OSError: the file cannot be written; an older one under the name is untouched.
        """
        cache = self.cache
        head = {
            "format": FORMAT,
            "description": [
                type(cache.description).__name__,
                dataclasses.asdict(cache.description),
            ],
            "specs": [dataclasses.asdict(spec) for spec in cache.specs],
            "context_length": cache.context_length,
            "dtype": str(cache.layers[0].key.dtype),
            "seed": self.seed,
            "position": self.position,
            "pending": self.pending,
            "tail": list(self.tail),
        }
        arrays: dict[str, Any] = {
            f"leaf{index}": _raw(np.asarray(leaf))
            for index, leaf in enumerate(jax.tree.leaves(cache))
        }
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with open_whole(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Session":
        """The session in a file written by `save`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a session, or one of another format.
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
        kind, fields = head["description"]
        dtype = jnp.dtype(head["dtype"])
        template = jax.eval_shape(
            lambda: create(
                _DESCRIPTIONS[kind](**fields),
                [LayerSpec(**spec) for spec in head["specs"]],
                1,
                dtype=dtype,
            )
        )
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
        )


def _raw(array: np.ndarray) -> np.ndarray:
    """bfloat16 as its bits: npz files know numpy's own types only."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
