"""Model configs as JSON, and models out of run folders."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sinkjax.checksums import damage
from sinkjax.models.config import DecoderConfig
from sinkjax.models.decoder import Decoder
from sinkjax.models.parameters import abstract, check_shapes, from_parameters, parameters
from sinkjax.sharding import DECODER_RULES, shardings
from sinkjax.strict_json import from_json, parse, to_json

logger = logging.getLogger("sinkjax.models")


def config_to_json(config: DecoderConfig) -> str:
    """The config as indented JSON text; `config_from_json` reads it back to an equal config."""
    return to_json(config)


def config_from_json(text: str | Mapping[str, Any], *, name: str = "config") -> DecoderConfig:
    """A decoder config from JSON text or from the mapping it holds.

    Args:
        text: what `config_to_json` wrote, or the parsed object.
        name: what to call it in an error, usually its file.

    Raises:
        ValueError: no JSON object, unknown keys (named), a missing key, or a value of another type
            or range.
    """
    return from_json(DecoderConfig, text, name=name)


def load(
    path: str | Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[Decoder, DecoderConfig]:
    """The model that a training run left behind.

    Only the parameters are read, not the optimiser, and compared with their checksums.

    Args:
        path: run folder: `config.json` with the model under ``"model"``, and `checkpoints/<step>`.
        step: which checkpoint; None is the newest that is as it was written: a damaged one is
            logged, with what is wrong with it, and left out.
        mesh: where the parameters go, by `sinkjax.sharding.DECODER_RULES`; None is one device.

    Returns:
        The model, and its config.

    Raises:
        ValueError: no such folder, no config or checkpoint in it, the checkpoint (or every one)
            damaged, or a checkpoint of another shape (names the first parameter that differs).
    """
    # Here, not above: `import sinkjax` must stay light.
    from orbax.checkpoint import v1 as ocp

    folder = Path(path).absolute()  # orbax takes no relative path
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
    run = parse(file.read_text(encoding="utf-8"), str(file))
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
    bad = []
    for number in steps[::-1] if step is None else [step]:
        reason = damage(root / str(number), part="params/")
        if not reason:
            return root / str(number)
        bad.append(f"{number}/{reason}")
        if step is None:
            logger.warning("%s is damaged and left out: %s", root / str(number), reason)
    raise ValueError(f"{root}: expected a checkpoint that is whole, got {'; '.join(bad)}")
