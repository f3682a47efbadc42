"""Steps compiled by the TPU's own compiler for chips that are not there."""

import dataclasses
import json
import re

import pytest

from sinkjax.cli import main
from sinkjax.models import preset
from sinkjax.plan import Job, Ring, Topology, compile_step, decode_mesh, plan, report
from sinkjax.train.config import DataConfig, MeshConfig, RunConfig

pytestmark = pytest.mark.tpu_aot
TINY = preset("tiny")


def run(shape, rows, **mesh):
    data = DataConfig(batch_size=rows)
    return RunConfig(model=shape, data=data, mesh=MeshConfig(**mesh))


def test_a_small_training_step():
    # Parameters of 132,992 bytes on each chip, two moments and a count beside them.
    stages = set()
    found = plan(Job("v5e:2x2", run(TINY, 8)), progress=stages.add)
    assert found.fits and found.mesh == {"data": 4, "model": 1} and found.notes == []
    sizes = found.bytes_per_chip
    parameters = (2 * 257 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 172)) // 4 * 4
    assert parameters < sizes["parameters"] < 1.01 * parameters  # norms are whole everywhere
    assert sizes["optimiser"] == 2 * sizes["parameters"] + 8 and sizes["batch"] == 5 * 2 * 64 * 4
    # The tables of 257 rows are padded to tiles, inputs are not donated but the state is.
    assert sizes["aliased"] >= sizes["parameters"] + sizes["optimiser"] - 8
    assert 1 <= found.flops_per_step["program"] / found.flops_per_step["arithmetic"] < 1.2
    assert found.collectives["all-gather"]["count"] >= 8 and stages
    assert 0 < found.mfu_estimate < 1 and found.floors["step"] >= max(
        found.floors["arithmetic"], found.floors["memory"]
    )


def test_what_the_compiler_refuses_does_not_fit_and_is_named():
    found = plan(Job("v5e:2x4", run(preset("llama3-8b"), 32)))
    assert not found.fits and found.mfu_estimate is None and found.mesh["data"] == 8
    assert found.bytes_per_chip["total"] > found.hbm_bytes == 16 * 2**30
    assert found.buffers[0].nbytes > 2**29 and "[" in found.buffers[0].shapes


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (Job("v5e:2x2", run(TINY, 6)), "batch: expected a multiple of 4 on this mesh, got 6"),
        (Job("v5e:2x2", run(TINY, 4, model=3)), "model: expected a divisor of 4"),
        (Job("v5e:3x7", run(TINY, 21)), "topology: the TPU's compiler knows no v5e:3x7"),
        (Job("v5e:2x2", run(TINY, 4), compiler_options=("xla_no_such=1",)), "compiler-options: "),
    ],
)
def test_jobs_that_do_not_fit_together(job, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        plan(job)


def test_a_chip_of_two_devices():
    found = plan(Job("tpu7x:2x2x1", run(TINY, 8)))
    assert (found.chips, found.devices, found.mesh) == (4, 8, {"data": 8, "model": 1})
    assert found.fits and found.hbm_bytes == 192 * 2**30
    assert found.bytes_per_chip["batch"] == 2 * 5 * 64 * 4


def test_a_chip_holds_its_part_of_the_cache_once():
    """Two layers of the 8B preset: kernels, and a cache that is written where it lies."""
    model = dataclasses.replace(preset("llama3-8b"), num_layers=2)
    rows, slots = 6, 4096
    assert decode_mesh(model, Topology("v5e:2x4")) == MeshConfig(model=8)
    job = Job("v5e:2x4", run(model, rows, model=4), Ring(4, slots - 4))
    compiled = compile_step(job)
    found = report(job, compiled)
    held = rows // 2 * (2 * 2 * 8 // 4 * slots * 128 * 2 + slots * 4 + 4)
    assert found.bytes_per_chip["cache"] == held <= found.bytes_per_chip["aliased"]
    # Temporaries are larger than a cache of two layers, and all of it is aliased.
    assert found.fits and not any("in place" in note for note in found.notes)
    # Weights, but for the embedding, and cache are read once: the floor of decoding.
    read = found.bytes_per_chip["parameters"] - 128256 // 4 * 4096 * 2 + held
    assert 0.8 * read < found.floors["memory"] * 819e9 < 1.5 * read
    assert compiled.hlo.count('custom_call_target="tpu_custom_call"') == 2


LARGE = Job("v5p:4x4x8", run(preset("llama3-8b"), 128))


def test_weight_gathers_of_8b_on_128_chips_overlap_with_arithmetic():
    """FSDP gathers every weight of a layer; on v5p that has to be asked for, and in rings."""
    found = plan(LARGE, quick=True)
    gathers = found.collectives["all-gather"]
    # Forward, again for the backward pass, and once more in it, but for what these share: in bfloat16.
    layers = 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) * 127 / 128
    assert 2 * layers < gathers["bytes"] < 3 * layers
    assert gathers["overlapped_bytes"] > 0.9 * gathers["bytes"]
    assert found.fits and found.mfu_estimate > 0.7
    # Most of the program's operations are the model's and its rematerialisation's.
    expected = found.flops_per_step["arithmetic"] + found.flops_per_step["recomputed"]
    assert 0.9 < found.flops_per_step["program"] / expected < 1.05


@pytest.mark.slow
def test_8b_on_128_chips_compiles_in_a_minute_and_a_half():
    """Scanned layers: 90 s of a core that has no company; seconds grow by half with some."""
    compiled = compile_step(LARGE)
    assert compiled.numbers is not None and compiled.numbers["compile_cpu_seconds"] < 150
    assert report(LARGE, compiled).fits


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "llama3-8b --topology v5e:16x16",
        "llama3-70b --topology v5p:8x8x8",
        "gpt-oss-20b --topology v5p:4x4x8",
        "gpt-oss-120b --topology v5p:8x8x8",
        "llama3-8b --topology v5p:4x4x8 --context-length 131072 --mesh.sequence 8",
        "llama3-8b --topology v5p:4x4x8 --context-length 131072 --mesh.sequence 8 --window 1024 "
        "--num-sink-tokens 4",
        "llama3-8b --topology v5e:2x4 --decode --window 4092",
        "llama3-70b --topology v5p:2x2x2 --decode",
    ],
)
def test_what_pods_are_planned_for(words, tmp_path, capsys):
    assert main(["plan", *words.split(), "--quick", "--json", str(tmp_path / "plan.json")]) == 0
    assert "\nfits: " in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and 0 < found["mfu_estimate"] < 1
    assert found["collectives"] and found["floors"]["arithmetic"] > 0
