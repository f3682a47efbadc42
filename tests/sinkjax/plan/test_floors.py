"""Floors by hand, slices by name, and the largest buffers."""

import dataclasses

import pytest

from sinkjax.chips import CHIPS, Chip
from sinkjax.plan.buffers import Buffer, largest, refused_bytes
from sinkjax.plan.collectives import Collective
from sinkjax.plan.floors import floors
from sinkjax.plan.topology import Topology

CHIP = Chip("toy", peak_flops=100.0, hbm_bytes=64, hbm_bandwidth=20.0, ici_bandwidth=5.0, links=4)
SENT = [
    Collective("all-gather", 3, 10.0, True, True),  # 30 bytes that hide
    Collective("all-reduce", 2, 5.0, False, False),  # 10 that do not
]


def test_floors_by_hand():
    found = floors(300.0, 50.0, SENT, CHIP)
    assert dataclasses.astuple(found) == (3.0, 2.5, 8.0, 2.0)
    assert found.step == 8.0  # 6 s of links hide 3 s of arithmetic, then 2 s exposed
    assert floors(900.0, 50.0, SENT, CHIP).step == 11.0
    assert floors(300.0, 500.0, [], CHIP).step == 25.0


def test_two_devices_share_a_chip():
    double = dataclasses.replace(CHIP, devices_per_chip=2)
    found = floors(300.0, 50.0, SENT, double)
    assert dataclasses.astuple(found) == (6.0, 5.0, 16.0, 4.0)


@pytest.mark.parametrize(
    ("name", "chips", "devices", "wrap"),
    [
        ("v5p:4x4x8", 128, 128, [True] * 3),
        ("v5p:2x2x4", 16, 16, [False] * 3),
        ("v5e:16x16", 256, 256, [True, True, False]),
        ("v5e:8x16", 128, 128, [False, True, False]),
        ("v6e:4x4", 16, 16, [False] * 3),
        ("tpu7x:2x2x1", 4, 8, [False] * 3),
    ],
)
def test_slices(name, chips, devices, wrap):
    found = Topology(name)
    assert (found.chips, found.devices, found.wrap) == (chips, devices, wrap)
    assert found.chip is CHIPS[name.partition(":")[0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p", "expected one of v4, v5e, v5p, v6e, tpu7x, a colon"),
        ("h100:2x2", "got 'h100:2x2'"),
        ("v5p:4x4x0", "got 'v5p:4x4x0'"),
        ("v5p:4x4", "expected 3 sizes for v5p, got 'v5p:4x4'"),
        ("v5e:4x4x4", "expected 2 sizes for v5e"),
    ],
)
def test_slices_that_do_not_exist(name, expected):
    with pytest.raises(ValueError, match=expected):
        Topology(name)


USAGE = """Memory Space: default (color=0)
Total bytes: 9539523936 (8.88GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    5.91GiB( 39%);    2.00GiB;    171261952;                5; 5×bf16[32,1,8192,4096]
    3.91GiB( 26%);    3.91GiB;   4575281152;                1; f32[8192,128256]
   12.97GiB( 84%);   62.62MiB;     30720000;                4; f32[1,4096], f32[1,8192]
  The rest 219 values are less than 5% of the total size and not shown.
"""


def test_largest_buffers_of_a_report():
    found = largest(USAGE, count=2)
    assert found == [
        Buffer(round(3.91 * 2**30), "f32[8192,128256]"),
        Buffer(2 * 2**30, "5×bf16[32,1,8192,4096]"),
    ]
    assert largest("") == [] and refused_bytes("") is None


REFUSALS = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(270.11G) exceeds available HBM (15.75G).Memory Space: default (color=0)": 270.11,
    "Ran out of memory in memory space hbm. Used 20.39G of 15.48G hbm. Exceeded hbm capacity": 20.39,
}


@pytest.mark.parametrize("text", REFUSALS)
def test_what_a_refused_program_would_take(text):
    assert refused_bytes(text) == round(REFUSALS[text] * 2**30)


def test_largest_allocations_of_a_refusal_go_before_the_report():
    text = """Largest program allocations in hbm:

  1. Size: 512.00M
     Operator: op_name="jit(step)/add"
     Shape: bf16[8192,32768]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.00M

  2. Size: 3.91G
     Shape: f32[8192,128256]{1,0:T(8,128)}
"""
    found = largest(USAGE, text)
    assert [(buffer.nbytes, buffer.source) for buffer in found] == [
        (round(3.91 * 2**30), ""),
        (2**29, "jit(step)/add"),
    ]
    assert found[1].shapes.startswith("bf16[8192,32768]")
