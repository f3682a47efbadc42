"""Checkpoints hold what they were given, newest N of them, or nothing."""

import dataclasses
import errno
import gc
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.checksums import damage
from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import parameters
from sinkjax.models.storage import load
from sinkjax.sharding import make_mesh
from sinkjax.strict_json import to_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import DataConfig, OptimizerConfig, RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.loop import fit
from sinkjax.train.step import abstract_state, init_state
from sinkjax.train.tasks import Backcopy

MODEL = DecoderConfig(
    vocab_size=65,
    model_dim=22,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=17,
    context_length=13,
)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(source="backcopy", batch_size=6),
    optimizer=OptimizerConfig(name="muon"),
)


@pytest.fixture(scope="module")
def state():
    return init_state(CONFIG, make_mesh(1, 1))


def _iterator():
    return iterate(batches(Backcopy(13), 6, seed=0))


def _plain(state):
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return jax.tree.map(np.array, state)


def test_round_trip_of_a_donated_state_and_of_the_iterator(tmp_path, state):
    # The writing goes on in the background while the next step overwrites the buffers it donated.
    scramble = jax.jit(
        lambda s: dataclasses.replace(
            s, params=jax.tree.map(lambda x: x * 3 + 1, s.params), step=s.step + 1
        ),
        donate_argnums=0,
    )
    moving = jax.tree.map(jnp.copy, state)
    walk, saved = _iterator(), {}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest is None
        for _ in range(5):
            next(walk)
            moving = scramble(moving)
            saved[int(moving.step)] = _plain(moving)
            checkpoints.save(moving, walk)
        moving = scramble(scramble(moving))
        checkpoints.wait()
        assert checkpoints.latest == 5
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    abstract = abstract_state(CONFIG, make_mesh(1, 1))
    for step in (4, 5):
        fresh = _iterator()
        with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
            back = checkpoints.restore(step, abstract, fresh, MODEL)
        jax.tree.map(np.testing.assert_array_equal, _plain(back), saved[step])
        assert jax.tree.structure(back) == jax.tree.structure(state)
        assert fresh.get_state() == {"next_index": step}
    # In another type it is the same numbers, rounded once.
    half = dataclasses.replace(MODEL, param_dtype="bfloat16")
    abstract = abstract_state(dataclasses.replace(CONFIG, model=half), make_mesh(1, 1))
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        back = checkpoints.restore(5, abstract, _iterator(), half)
    assert back.params["head"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        _plain(back).params,
        saved[5].params,
    )
    # The models room reads the run folder without knowing the optimiser.
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    model, config = load(tmp_path)
    assert config == MODEL
    jax.tree.map(np.testing.assert_array_equal, parameters(model), saved[5].params)


def test_leftovers_of_a_killed_process_are_removed(tmp_path, state):
    torn = tmp_path / "7.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "half").write_text("written")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(state, _iterator())
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_another_shape_names_the_first_parameter_that_differs(tmp_path, state):
    wide = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, mlp_dim=19))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state, _iterator())
        checkpoints.wait()
        abstract = abstract_state(wide, make_mesh(1, 1))
        with pytest.raises(ValueError, match=r"blocks/0/mlp/\w+/kernel: expected .*19.* got .*17"):
            checkpoints.restore(0, abstract, _iterator(), wide.model)


def _two(folder, state):
    """Checkpoints 1 and 2, whose iterators stand at batches 1 and 2; what each holds."""
    walk, saved = _iterator(), {}
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (1, 2):
            next(walk)
            moved = jax.tree.map(lambda x, by=step: x * by + by, state.params)
            moved = dataclasses.replace(state, params=moved, step=jnp.int32(step))
            checkpoints.save(moved, walk)
            saved[step] = _plain(moved)
    return saved


def _newest(folder, saved):
    """Step of the newest good checkpoint, after comparing all it holds with what was saved."""
    fresh = _iterator()
    with Checkpoints(folder, keep=5) as checkpoints:
        found = checkpoints.restore_newest(abstract_state(CONFIG, make_mesh(1, 1)), fresh, MODEL)
        if found is None:
            return None
        state, step = found
        assert checkpoints.latest == step and fresh.get_state() == {"next_index": step}
        jax.tree.map(np.testing.assert_array_equal, _plain(state), saved[step])
    return step


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _payload(folder):
    """The file of the arrays of the parameters."""
    data = (path for path in _files(folder / "params") if path.parent.name == "d")
    return max(data, key=lambda path: path.stat().st_size)


def _flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_skipped_and_its_step_saved_again(
    tmp_path, state, caplog
):
    assert _newest(tmp_path, {}) is None
    saved = _two(tmp_path, state)
    assert _newest(tmp_path, saved) == 2 and not caplog.records
    payload = _payload(tmp_path / "2")
    _flip(payload)
    assert _newest(tmp_path, saved) == 1
    [record] = caplog.records
    name = payload.relative_to(tmp_path / "2")
    start = f"{tmp_path / '2'} is damaged and left out: {name}: expected CRC-32 "
    assert record.levelname == "WARNING" and record.getMessage().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.corrupt"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(2)), _iterator())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.corrupt"]

    # Where nothing is whole nothing is touched: a run must not begin anew by itself.
    _flip(_payload(tmp_path / "2"))
    words = rf"{tmp_path}: expected a checkpoint that is whole, got 2/params/.*CRC-32"
    with pytest.raises(ValueError, match=words):
        _newest(tmp_path, saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "2.corrupt"]


def test_what_was_not_finished_is_never_restored(tmp_path, state, monkeypatch):
    saved = _two(tmp_path, state)
    seen = []

    def fail(folder, parts):
        # Everything else is on the disk by now, and only the name is missing.
        seen.extend(sorted(path.name for path in folder.iterdir()))
        assert not (tmp_path / "3").exists()
        shutil.copytree(folder, tmp_path / "copy")
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr("sinkjax.train.checkpoint.write_checksums", fail)
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(3)), _iterator())
        with pytest.raises(OSError, match="checkpoint not written: No space left"):
            checkpoints.wait()
    assert {"params", "train"} <= set(seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "copy"]
    # A folder that someone gave the name of a finished one, and one without anything in it.
    (tmp_path / "copy").rename(tmp_path / "3")
    (tmp_path / "4").mkdir()
    assert _newest(tmp_path, saved) == 2
    left = ["1", "2", "3.corrupt", "4.corrupt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


# Written last, and not needed to read the arrays.
_NOT_RECORDED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.slow
def test_no_damage_to_any_file_goes_unnoticed(tmp_path, state, caplog, capfd):
    saved = _two(tmp_path / "run", state)
    names = [path.relative_to(tmp_path / "run" / "2") for path in _files(tmp_path / "run" / "2")]
    kinds = {path.name if path.parent.name != "d" else "d" for path in names}
    assert kinds >= {"d", "manifest.ocdbt", "_METADATA", "_sharding", "process_0"} | _NOT_RECORDED
    damages = {
        "a bit": lambda path: _flip(path, 0.37),
        "the last bit": lambda path: _flip(path, 0.9999),
        "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "gone": Path.unlink,
    }
    for number, name in enumerate(names):
        whole = name.parent == Path() and name.name in _NOT_RECORDED
        for kind, harm in damages.items():
            folder = tmp_path / f"{number}-{kind}"
            shutil.copytree(tmp_path / "run", folder)
            harm(folder / "2" / name)
            found = damage(folder / "2")
            assert found == "" if whole else found.startswith(str(name)), (name, kind)
            if kind == list(damages)[number % 5]:
                caplog.clear()
                assert _newest(folder, saved) == (2 if whole else 1), (name, kind)
                if not whole:
                    assert caplog.messages == [f"{folder / '2'} is damaged and left out: {found}"]
            shutil.rmtree(folder)
    # Damaged files never reach Orbax, which would leave coroutines and tracebacks behind.
    gc.collect()
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_nothing_had_been(tmp_path, caplog):
    config = dataclasses.replace(
        CONFIG, path=str(tmp_path / "run"), steps=5, checkpoint_every=2, log_every=1, eval_batches=1
    )

    def run():
        done = fit(config)
        # All but the speed, and what is computed from it.
        names = ("step", "split", "loss", "nll", "gradient_norm", "importance", "entropy")
        return [{n: r[n] for n in names if n in r} for r in done.metrics], done.model

    whole, model = run()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "5"]
    for step in "45":
        _flip(_payload(folder / step))
    again, same = run()
    assert [message.split(" is damaged")[0] for message in caplog.messages] == [
        str(folder / "5"),
        str(folder / "4"),
    ]
    assert again == whole  # every record once, and bit for bit
    jax.tree.map(np.testing.assert_array_equal, parameters(same), parameters(model))
    left = ["2", "4", "4.corrupt", "5", "5.corrupt"]
    assert sorted(path.name for path in folder.iterdir()) == left


_VICTIM = """
import dataclasses, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from sinkjax.models.config import DecoderConfig
from sinkjax.sharding import make_mesh
from sinkjax.strict_json import from_json
from sinkjax.train import checkpoint
from sinkjax.train.config import RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.step import init_state
from sinkjax.train.tasks import Backcopy

folder, config, point = Path(sys.argv[1]), from_json(RunConfig, sys.argv[2]), sys.argv[3]

def stop(*_):
    (folder / "here").touch()
    time.sleep(600)

state = init_state(config, make_mesh(1, 1))
walk = iterate(batches(Backcopy(13), 6, seed=0))
checkpoints = checkpoint.Checkpoints(folder / "checkpoints", keep=2)
for step in (1, 2):
    next(walk)
    state = dataclasses.replace(state, step=jnp.int32(step))
    checkpoints.save(state, walk)
    checkpoints.wait()
write = checkpoint.write_checksums
if point == "before the record":
    checkpoint.write_checksums = stop
if point == "after the record":
    checkpoint.write_checksums = lambda *given: (write(*given), stop())
checkpoints.save(dataclasses.replace(state, step=jnp.int32(3)), walk)
(folder / "saving").touch()
checkpoints.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["the folder is there", "data is written", "before the record", "after the record"]
)
def test_a_process_killed_in_the_middle_of_a_save(tmp_path, point):
    # 13 million numbers, three times with the moments of AdamW: they take a while to write.
    wide = dataclasses.replace(MODEL, vocab_size=300_001)
    config = dataclasses.replace(CONFIG, model=wide, optimizer=OptimizerConfig())
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(tmp_path), to_json(config), point],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    folder = tmp_path / "checkpoints"

    def reached():
        if point == "the folder is there":
            return any(folder.glob("3.*"))
        if point == "data is written":
            return any(path.stat().st_size > 0 for path in folder.glob("3.*/*/*/d/*"))
        return (tmp_path / "here").exists()

    try:
        until = time.monotonic() + 120
        while not reached():
            assert victim.poll() is None and time.monotonic() < until
            time.sleep(0.001)
    finally:
        victim.kill()
        victim.wait()
    # It was in the middle: the third is there in part, and only under its temporary name.
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["1", "2"] and len(names) == 3 and names[2].startswith("3."), names
    assert any(path.is_file() for path in folder.glob("3.*/**/*")) or point.startswith("the folder")

    fresh = _iterator()
    with Checkpoints(folder, keep=2) as checkpoints:
        abstract = abstract_state(config, make_mesh(1, 1))
        state, step = checkpoints.restore_newest(abstract, fresh, wide)
        assert step == int(state.step) == 2 and fresh.get_state() == {"next_index": 2}
        first = init_state(config, make_mesh(1, 1))
        jax.tree.map(np.testing.assert_array_equal, _plain(state).params, _plain(first).params)
        checkpoints.save(dataclasses.replace(state, step=jnp.int32(4)), fresh)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


_ONE_OF_TWO = """
import dataclasses, json, logging, sys
from pathlib import Path
import jax, numpy as np

index, folder = int(sys.argv[1]), Path(sys.argv[4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
from jax.experimental.multihost_utils import sync_global_devices
from sinkjax.sharding import make_mesh
from sinkjax.strict_json import from_json
from sinkjax.train.checkpoint import Checkpoints
from sinkjax.train.config import RunConfig
from sinkjax.train.data import batches, iterate
from sinkjax.train.step import abstract_state, init_state
from sinkjax.train.tasks import Backcopy

config, mesh = from_json(RunConfig, sys.argv[3]), make_mesh(4)
state, walk = init_state(config, mesh), iterate(batches(Backcopy(13), 6, seed=0))
add = jax.jit(lambda s: dataclasses.replace(s, step=s.step + 1))
with Checkpoints(folder, keep=5) as checkpoints, jax.set_mesh(mesh):
    for _ in range(3):
        next(walk)
        state = add(state)
        checkpoints.save(state, walk)
    checkpoints.wait()
    sync_global_devices("saved")
    if index == 0:
        # Files alternate between the two processes: one bad file for each to find.
        for step, share in ((3, 1), (2, 0)):
            record = json.loads((folder / str(step) / "checksums.json").read_bytes())
            names = sorted(record["size and crc32"])[share::2]
            name = next(name for name in names if "/ocdbt.process_1/" in name)
            (folder / str(step) / name).write_bytes(b"damaged")
    sync_global_devices("damaged")
    walk = iterate(batches(Backcopy(13), 6, seed=0))
    back, step = checkpoints.restore_newest(abstract_state(config, mesh), walk, config.model)
    assert step == int(back.step) == checkpoints.latest == 1, step
    assert walk.get_state() == {"next_index": 1}
    for found, wanted in zip(jax.tree.leaves(back.params), jax.tree.leaves(state.params)):
        for one, other in zip(found.addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(one.data, other.data)
    checkpoints.save(add(back), walk)
"""


@pytest.mark.hosts
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, model_dim=24))
    arguments = [str(port), to_json(config), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_OF_TWO, str(index), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for text in errors:
        for step in (2, 3):
            assert re.search(rf"{tmp_path}/{step} is damaged and left out: .*expected \d+ by", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.corrupt", "3.corrupt"]
    # One process takes over what two have written.
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        abstract = abstract_state(config, make_mesh(1, 1))
        back, step = checkpoints.restore_newest(abstract, _iterator(), config.model)
    assert step == 2
    wanted = init_state(config, make_mesh(1, 1)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), back.params, wanted)
