"""One decode step of a large model on TPU chips that are not there: bytes per chip.

Claim. The 8B preset streams on a ring of 4,096 slots (4 sink tokens and 4,092 tokens at cache-relative
positions) on eight v5e chips of 16 GiB, the donated cache updated where it lies.

Command (about a minute on two CPU cores; needs the extra `tpu`):

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python experiments/decode_on_tpu.py

The compiler of the TPU runs on the host, on shapes alone: parameters laid out by `DECODER_RULES`, the
cache by `cache_shardings`. Arguments, results and temporaries are what it says they take; results
that lie in a donated argument take nothing.

Expected: the total below 16 GiB, all of the cache aliased. The exit status is 1 where it is not.

Results are in LOG.md.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from sinkjax.cache import SinkWindow
from sinkjax.cli.record import environment, write_json
from sinkjax.models import DecoderConfig, preset
from sinkjax.models.parameters import abstract, from_parameters, parameters
from sinkjax.sharding import batch_sharding, cache_shardings, make_mesh, shardings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Compile a decode step for TPU chips and count its bytes."""

    preset: str = "llama3-8b"
    """Shape of the model."""

    topology: str = "v5e:2x4"
    """Chips, as the compiler names them."""

    model: int = 8
    """Chips over which layers are cut; the rest cut the rows."""

    rows: int = 16
    """Streams in a step."""

    sinks: int = 4
    """Sink tokens of the cache."""

    window: int = 4092
    """Tokens of its window. With a sum of sinks and window that 8 does not divide, the compiler copies
    the cache around the kernel."""

    limit: float = 16.0
    """GiB of a chip."""

    json: Path | None = None
    """Also write the numbers here."""


def compile_step(
    shape: DecoderConfig, description: SinkWindow, rows: int, topology: str, model: int
) -> tuple[Any, int]:
    """The compiled greedy step, and the bytes of its cache on one chip.

    Layers are unrolled: a stack of them would have to be sliced at every token. Parameters are bfloat16.
    """
    config = dataclasses.replace(
        shape, scan_layers=False, remat="none", dtype="bfloat16", param_dtype="bfloat16"
    )
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(-1, model, devices=chips)

    def placed(tree, layout):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, layout
        )

    decoder = abstract(config)
    shapes = parameters(decoder)
    params = placed(shapes, shardings(shapes, mesh))
    cache = jax.eval_shape(lambda: decoder.init_cache(description, rows))
    layout = cache_shardings(cache, mesh)
    tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=batch_sharding(mesh))

    @functools.partial(
        jax.jit, donate_argnames=("cache",), out_shardings=(batch_sharding(mesh), layout)
    )
    def step(params, cache, tokens):
        output = from_parameters(config, params)(tokens, cache=cache)
        return jnp.argmax(output.logits, axis=-1), output.cache

    with jax.set_mesh(mesh):
        compiled = step.lower(params, placed(cache, layout), tokens).compile()
    held = sum(
        int(np.prod(place.shard_shape(x.shape))) * x.dtype.itemsize
        for x, place in zip(jax.tree.leaves(cache), jax.tree.leaves(layout), strict=True)
    )
    return compiled, held


def bytes_per_chip(compiled: Any) -> dict[str, int]:
    """What the compiler says that one chip holds."""
    found = compiled.memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "results": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    return sizes | {"total": total}


def main(config: Experiment) -> int:
    """Compile, print, write; 0 if it fits and the cache is updated where it lies."""
    started = time.perf_counter()
    compiled, held = compile_step(
        preset(config.preset),
        SinkWindow(config.sinks, config.window),
        config.rows,
        config.topology,
        config.model,
    )
    sizes = bytes_per_chip(compiled)
    title = f"{config.preset}, {config.rows} rows, {config.topology}, bytes per chip"
    table = Table(title=title, title_justify="left")
    for heading in ("", "bytes", "GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, size in (sizes | {"of these, the cache": held}).items():
        table.add_row(name, f"{size:,}", f"{size / 2**30:.2f}")
    Console().print(table)
    wrong = []
    if sizes["total"] > config.limit * 2**30:
        wrong.append(f"the total is above {config.limit} GiB")
    if sizes["aliased"] < held:
        wrong.append(f"only {sizes['aliased']:,} bytes of the cache's {held:,} are aliased")
    if sizes["temporaries"] > held / 2:
        wrong.append("the temporaries are as large as a copy of the cache")
    if config.json is not None:
        write_json(
            config.json,
            {
                "claim_holds": not wrong,
                "wrong": wrong,
                "cache_bytes": held,
                **sizes,
                "settings": dataclasses.asdict(config),
                **environment(None, started),
            },
        )
    print("The claim holds." if not wrong else "The claim does NOT hold: " + "; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Experiment)))
