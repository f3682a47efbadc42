"""Model configs as JSON, and models out of run folders."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sinkjax.models.config import DecoderConfig
from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import abstract, check_shapes, from_parameters, parameters
from sinkjax.sharding import DECODER_RULES, shardings


def config_to_json(config: DecoderConfig) -> str:
    """The config as indented JSON text; `config_from_json` reads it back to an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str | Mapping[str, Any], *, name: str = "config") -> DecoderConfig:
    """A decoder config from JSON text or from the mapping it holds.

    Args:
        text: what `config_to_json` wrote, or the parsed object.
        name: what to call it in an error, usually its file.

    Raises:
        ValueError: no JSON object, unknown keys (named), a missing key, or a value of another type
            or range.
    """
    values = _parse(text, name) if isinstance(text, str) else text
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: expected a JSON object, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(DecoderConfig)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{name}: unknown keys {', '.join(unknown)}; expected some of {', '.join(fields)}"
        )
    required = [key for key, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{name}: expected the key {missing[0]!r}, got {', '.join(values)}")
    hints = typing.get_type_hints(DecoderConfig)
    return DecoderConfig(
        **{key: _value(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    )


def load(
    path: str | Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, DecoderConfig]:
    """The model that a training run left behind.

    Only the parameters are read, not the optimiser.

    Args:
        path: run folder: `config.json` with the model under ``"model"``, and `checkpoints/<step>`.
        step: which checkpoint; None is the newest.
        mesh: where the parameters go, by `sinkjax.sharding.DECODER_RULES`; None is one device.

    Returns:
        The model, and its config.

    Raises:
        ValueError: no such folder, no config or checkpoint in it, or a checkpoint of another shape
            (names the first parameter that differs).
    """
    # Here, not above: `import sinkjax` must stay light.
    from orbax.checkpoint import v1 as ocp

    folder = Path(path)
    config = _run_config(folder)
    checkpoint = _checkpoint(folder, step)
    found = ocp.checkpointables_metadata(str(checkpoint)).metadata
    if "params" not in found:
        raise ValueError(
            f"{checkpoint}: expected parameters under 'params', got {', '.join(found) or 'nothing'}"
        )
    check_shapes(config, found["params"], source=str(checkpoint))
    shapes = parameters(abstract(config))
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: one, shapes)
    else:
        places = shardings(shapes, mesh, DECODER_RULES)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    restored = ocp.load_checkpointables(str(checkpoint), {"params": wanted})
    return from_parameters(config, restored["params"]), config


def _run_config(folder: Path) -> DecoderConfig:
    if not folder.is_dir():
        raise ValueError(f"path: expected a run folder, got {folder}, which is no folder")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"path: expected a run folder with a config.json, got {folder}")
    run = _parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(run, dict) or "model" not in run:
        raise ValueError(f"{file}: expected the model's config under the key 'model'")
    return config_from_json(run["model"], name=f"{file}: model")


def _checkpoint(folder: Path, step: int | None) -> Path:
    root = folder / "checkpoints"
    # An unfinished save carries a temporary name, so a plain number is a whole checkpoint.
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdecimal())
    if not steps:
        raise ValueError(f"path: expected a checkpoint in {root}, got none")
    if step is not None and step not in steps:
        raise ValueError(f"step: expected one of {', '.join(map(str, steps))}; got {step}")
    return root / str(steps[-1] if step is None else step)


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON, got {error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    """``value`` as the type ``hint`` has it: JSON knows no tuples and writes 1.0 as 1."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{name}: expected one of {', '.join(arguments)}; got {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    kinds = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value
