"""What one of several processes does: streams on a mesh of all, and what they drew as JSON.

`python stream_program.py COORDINATOR COUNT PROCESS MESH OUT`, MESH the arguments of `make_mesh` as
JSON; COUNT 1 for one process. All save their session on the same path, as on a shared disk.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from sinkjax.cache import SinkWindow
from sinkjax.models import from_parameters, parameters, preset
from sinkjax.models.parameters import abstract
from sinkjax.sharding import make_mesh, resident, shardings
from sinkjax.stream import Batch, Sampler, Session, prefill
from sinkjax.train.distributed import DistributedConfig, joined

ROWS, C, CHUNK = 4, 23, 7
CONFIG = dataclasses.replace(
    preset("tiny"), model_dim=24, num_heads=8, num_kv_heads=4, head_dim=10, context_length=C
)
# Prompt, seed and number of tokens; two have to wait for a row.
STREAMS = [([n + 1] * (1 + 4 * n), n, 9 + 6 * (n % 3)) for n in range(ROWS + 2)]
CUT, AFTER = 3, 6
"""The stream that is saved and retired in the middle, loaded and continued; and after how many tokens."""


def model_on(mesh):
    draw = np.random.default_rng(0).normal
    shapes = parameters(abstract(CONFIG))
    params = jax.tree.map(lambda x: np.float32(draw(scale=0.12, size=x.shape)), shapes)
    layout = shardings(shapes, mesh, resident())
    return from_parameters(CONFIG, jax.device_put(params, layout))


def streams(model, folder: Path):
    cache, sampler = SinkWindow(3, C - 3), Sampler(temperature=0.9, top_k=11)
    batch = Batch(model, cache, rows=ROWS, chunk_size=CHUNK, sampler=sampler)
    ids = [batch.admit(p, seed=s, max_new_tokens=n) for p, s, n in STREAMS]
    found: dict[int, list] = {}
    for id, event in batch.run():
        found.setdefault(id, []).append((event.token, event.logprob))
        if id == ids[CUT] and len(found[id]) == AFTER:
            path = folder.parent / "session"
            batch.session(id).save(path)
            batch.retire(id)
            ids.append(batch.admit(session=Session.load(path)))
        if id == ids[-1] and len(found[id]) == STREAMS[CUT][2] - AFTER:
            batch.retire(id)
    found[ids[CUT]] += found.pop(ids[-1])
    return [found[id] for id in ids[: len(STREAMS)]]


def rows_at_once(model):
    """Rows of different length, read twice: the second time their clocks are where the first left them."""
    tokens = np.arange(ROWS * 31).reshape(ROWS, 31) % 257
    cache = model.init_cache(SinkWindow(3, C - 3), ROWS)
    for lengths in ([31, 4, 17, 9], [2, 11, 0, 31]):
        logits, cache = prefill(model, cache, tokens, lengths=lengths, chunk_size=CHUNK)
    logits = jax.device_put(logits, jax.NamedSharding(logits.sharding.mesh, jax.P()))
    return np.asarray(logits).tolist()


def main(coordinator: str, count: str, process: str, mesh: str, out: str) -> None:
    config = DistributedConfig()
    if int(count) > 1:
        config = DistributedConfig("explicit", coordinator, int(count), int(process))
    folder = Path(out) / process
    folder.mkdir(parents=True)
    with joined(config):
        model = model_on(make_mesh(**json.loads(mesh)))
        found = {"streams": streams(model, folder), "rows": rows_at_once(model)}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
