"""Parameters of a decoder as plain nested dicts, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from sinkjax.models.config import DecoderConfig
from sinkjax.models.decoder import Decoder


def abstract(config: DecoderConfig) -> Decoder:
    """The decoder of ``config`` with shapes in place of arrays; costs no memory at any size."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def parameters(model: nnx.Module) -> dict[str, Any]:
    """All parameters as nested dicts of arrays: the names that checkpoints hold."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def count(config: DecoderConfig) -> int:
    """Number of parameters of the decoder of ``config``."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters(abstract(config))))


def check_shapes(
    config: DecoderConfig, found: Mapping[str, Any], *, source: str = "parameters"
) -> None:
    """Refuse parameters that do not fit ``config``.

    Raises:
        ValueError: names the first parameter that is missing, unknown or of another shape.
    """
    expected = _flat(parameters(abstract(config)))
    given = _flat(found)
    for name in [*expected, *(name for name in given if name not in expected)]:
        want = tuple(expected[name].shape) if name in expected else "no such parameter"
        have = tuple(given[name].shape) if name in given else "none"
        if want != have:
            raise ValueError(f"{source}: parameter {name}: expected {want}, got {have}")


def from_parameters(config: DecoderConfig, params: Mapping[str, Any]) -> Decoder:
    """The decoder of ``config`` with the given parameters, arrays taken as they are.

    Args:
        config: the description.
        params: nested dicts as `parameters` gives them.

    Raises:
        ValueError: names the first parameter that does not fit.
    """
    check_shapes(config, params)
    graphdef, state = nnx.split(abstract(config))
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graphdef, state)


def unroll(model: Decoder) -> Decoder:
    """The same model with one module per layer: what capture, editing and decoding want.

    Args:
        model: with ``scan_layers`` or without; without, it comes back as it is.
    """
    config = model.config
    if not config.scan_layers:
        return model
    params = parameters(model)
    stacks, pattern = params["blocks"], len(config.windows)
    params["blocks"] = {
        index: jax.tree.map(lambda leaf, i=index: leaf[i // pattern], stacks[index % pattern])
        for index in range(config.num_layers)
    }
    return from_parameters(dataclasses.replace(config, scan_layers=False), params)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return leaves
