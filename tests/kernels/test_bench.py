"""The bench: a schedule is read and followed right, counts become the rows and verdicts they should."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sinkjax_kernels.bench import (
    chips,
    cli,
    descent,
    limits,
    llo,
    our_blocks,
    pool,
    schedule,
    splash,
    splash_blocks,
    table,
    walk,
)
from sinkjax_kernels.bench.worker import Built, Job, Kernel
from sinkjax_kernels.cases import CASES, case
from sinkjax_kernels.devices import TPUS
from sinkjax_kernels.flash.ranges import Ranges
from sinkjax_kernels.flash.tpu_blocks import BLOCKS, Blocks

# A grid of five steps. The first two do what the third piece holds; a scalar is spilled and comes back; a
# vector decides whether the last piece runs.
SCHEDULE = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s1_s0 = smov 0 /* copy for cssa */  ;;  %s2_s1 = inlined_call_operand.vmem [shape: f32[2]] } /* Start region 1 */
   0x1 LB: > { %s4_s2 = sphi %s1_s0, %s20_s3 /* iteration index, stage = 0 */  ;;  %p5_p0 = scmp.ge.s32.totalorder %s4_s2, 2 } /* Start region 9 */
   0x2   : > { %31 = sst [smem:[#allocation5_spill]] %s4_s2  ;;  %6 = sbr.rel (%p5_p0) target = $region5 }
   0x3   : > {}
   0x4   : > { %10 = dma.hbm_to_vmem [thread:$0]  (!%p5_p0), /*hbm=*/%s8_s2 /*
base_bounds: (1, 8)
iteration_bounds: (1, 8) */ }
   0x5   :  {}
   0x6   : > {} /* End region 4 */
   0x7   : > { %7 = vmatmul.bf16.gmra.mxu0 %v1_v1  ;;  %8 = vmatmul.bf16.gmra.mxu1 %v2_v2 } /* Start region 4 */
   0x8   : > { %9 = vmatmul.bf16.gmra.mxu0 %v1_v3  ;;  %11 = vst [vmem:[#allocation2_spill]] %v3_v3 }
   0x9 PF: > { %s21_s4 = sld [smem:[#allocation5_spill]] } /* Start/End empty region 5 :: Start region 6 */
   0xa   : > { %s20_s3 = sadd.s32 1, %s21_s4  ;;  %p12_p1 = vbr.any %vm1_vm1 }
   0xb   : > { %13 = sbr.rel (!%p12_p1) target = $region7 }
   0xc   : > {}
   0xd   : > {}
   0xe   : > {}
   0xf   : > {}
  0x10   : > { %14 = vmatmul.bf16.gmra.mxu0 %v1_v1 }
  0x11   : > {}
  0x12   : > {}
  0x13 PF: > { %s15_s5 = smov (!%p5_p0, %s20_s3), 100  ;;  %p16_p2 = scmp.lt.s32.totalorder %s20_s3, 5 } /* Start/End empty region 7 */
  0x14   : > { %17 = sbr.rel (%p16_p2) target = $region9 }
  0x15   : > {}
  0x16   : > {}
  0x17   : > {}
  0x18   : > {} /* End region 9 */
  0x19   :  { %18 = vsyncpa [#allocation3], 1 }
"""  # noqa: E501


def utilization(spilled=(8,), size=26):
    rows = [f"0 0 0 0 0 0 0 0 {int(n in spilled)} 0" for n in range(size)]
    header = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    return "\n".join(["== CAPACITY:", header, "4 3 4 2 1 3 3 1 1 2", "== UTILIZATION:", *rows])


def followed(text=SCHEDULE):
    return walk.walk(llo.parse("kernel", text, utilization()))


def test_a_schedule_is_followed():
    found = followed()
    assert found.program.size == 26 and sum(found.program.spills) == 1
    # Before and after the loop, then per step: up to the first branch, the join up to the second, the end.
    per_step = 6 + 7 + 6
    assert found.cycles == 1 + 5 * per_step + 2 * 2 + 1
    assert found.steps == (21, 21, 19, 19, 20)  # the last takes what follows the loop
    assert [(t.bundles, t.runs, t.matmuls) for t in found.tiles] == [(2, 2, 3)]
    assert [(s.bundles, s.reached, s.matmuls) for s in found.skipped] == [(3, 5, 1)]


def test_a_value_that_is_only_conditionally_replaced_keeps_the_other():
    """`(!p, a), b` is b where p is false, else a."""
    text = SCHEDULE.replace(
        "scmp.lt.s32.totalorder %s20_s3, 5", "scmp.lt.s32.totalorder %s15_s5, 4"
    )
    assert text != SCHEDULE
    assert len(followed(text).steps) == 1  # 100 while p is false: no second turn
    swapped = text.replace("(!%p5_p0, %s20_s3), 100", "(%p5_p0, %s20_s3), 100")
    assert len(followed(swapped).steps) == 3  # 1, 2, then 100


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("target = $region5", "target = $region55", "jump sbr.rel .* at bundle 0x2"),
        ("sadd.s32 1", "sfrob.s32 1", "depends on sfrob.s32 .* at bundle 0xa"),
        ("sbr.rel (!%p12_p1) target = $region7", "sbr.rel (!%p12_p1) target = $region4", "on data"),
        ("   0x5   :", "   0x7   :", "bundle 5 is numbered 0x7"),
        ("Start/End empty region 5 ::", "::", "jump"),
    ],
)
def test_what_is_not_understood_is_an_error(old, new, reason):
    text = SCHEDULE.replace(old, new)
    assert text != SCHEDULE
    with pytest.raises(llo.ScheduleError, match=reason):
        followed(text)


def jump_at_2(*following, back=False):
    """A program of a loop (1 … end) whose bundle 2 jumps out, or back, before `following`."""
    marks = {"jump": "%5 = sbr.rel (%p4_p0) target = $region5", "end": "{} /* End region 9 */"}
    where = "$region9" if back else "$region5"
    lines = [
        "     0   :  { %s1_s0 = smov 0 } /* Start region 1 */",
        "   0x1 LB: > { %s4_s2 = sphi %s1_s0, %s9_s9  ;;  %p4_p0 = scmp.lt.s32.totalorder %s4_s2, 3 }"
        " /* Start region 9 */",
        f"   0x2   : > {{ {marks['jump'].replace('$region5', where)} }}",
    ]
    lines += [f"{hex(n):>6} {text}" for n, text in enumerate(following, 3)]
    lines.append(f"{hex(len(lines)):>6} PF:  {{ %9 = vsyncpa 1 }} /* Start/End empty region 5 */")
    return "\n".join(lines), len(lines)


EARLY = "  : > { %v1_v1 = vmov (!%p4_p0), 0.0  ;;  %s3_s3 = int_to_ptr.vmem [resolvable:$false] %s1_s0 }"
LAST = "  : > { %s9_s9 = sadd.s32 1, %s4_s2 } /* End region 9 */"
EMPTY, BODY = "  :  {}", "  : > { %v2_v2 = vld [vmem:[#allocation1]] }"


@pytest.mark.parametrize(
    ("following", "delay"),
    [
        ([EMPTY, BODY, BODY], 1),
        ([EARLY, EMPTY, BODY, BODY], 2),
        (
            [EARLY, EMPTY, EMPTY, EARLY, EMPTY, BODY, BODY],
            5,
        ),  # an empty one between is of the delay
        ([BODY, BODY, LAST, EARLY, EMPTY, BODY, BODY], 5),
        ([BODY, BODY, BODY, BODY, BODY, LAST, BODY, BODY], 6),  # full: nothing closes it
        ([EARLY] * 6 + [BODY], 6),
        ([EARLY, EMPTY], 2),  # up to where it jumps to
    ],
)
def test_a_delay_that_each_jump_has_for_itself(following, delay):
    text, size = jump_at_2(*following)
    program = llo.parse("kernel", text, utilization((), size), delay=None)
    assert [b.end - b.bundle - 1 for b in program.branches.values()] == [delay]


def test_a_delay_at_the_end_of_a_loop():
    """Behind it another region ends soon, which is not the jump's."""
    outer = "  :  { %7 = vsyncpa 2 } /* End region 1 */"
    text, size = jump_at_2(BODY, LAST, EMPTY, outer, back=True)
    program = llo.parse("kernel", text, utilization((), size), delay=None)
    assert list(program.branches) == [6]
    assert walk.walk(program).cycles == 1 + 4 * 5 + 2
    with pytest.raises(llo.ScheduleError, match="no end of the delay of the jump at bundle 0x2"):
        llo.parse("kernel", jump_at_2(BODY, BODY)[0], utilization((), 6), delay=None)


def test_a_table_of_another_program_is_an_error():
    with pytest.raises(llo.ScheduleError, match="26 bundles, but 25 rows"):
        llo.parse("kernel", SCHEDULE, utilization(size=25))
    with pytest.raises(llo.ScheduleError, match="no table"):
        llo.parse("kernel", SCHEDULE, "")
    with pytest.raises(llo.ScheduleError, match="no bundles"):
        llo.parse("kernel", "", utilization())


def test_a_folder_of_dumps(tmp_path):
    for number, name in enumerate(["TLP", "<late>", "fusion.3", "jvp_sinkjax_forward_.1"]):
        stem = f"{number + 17}-{name}"
        (tmp_path / f"{stem}-02-final_bundles.txt").write_text(SCHEDULE)
        (tmp_path / f"{stem}-01-schedule-analysis_final_bundles.txt").write_text("other")
        (tmp_path / f"{stem}-00-final_hlo-static-per-bundle-utilization.txt").write_text(
            utilization()
        )
    assert [p.name for p in llo.read(tmp_path)] == ["fusion.3", "jvp_sinkjax_forward_.1"]


MASKS = [Ranges(), Ranges(200), Ranges(200, 4), Ranges(128, 4), Ranges(1, 20), Ranges(700, 130)]


def visible(ranges, length):
    distance = np.arange(length)[:, None] - np.arange(length)
    window, sinks = ranges.window or length, ranges.num_sink_tokens
    return (distance >= 0) & ((distance < window) | (np.arange(length) < sinks))


@pytest.mark.parametrize("ranges", MASKS, ids=str)
def test_splash_visits_the_blocks_that_have_a_visible_pair(ranges):
    seen = visible(ranges, 1024)
    for queries, keys in [(128, 256), (256, 128), (512, 512)]:
        want = seen.reshape(1024 // queries, queries, 1024 // keys, keys).any((1, 3))
        np.testing.assert_array_equal(splash.active(ranges, 1024, (queries, keys)), want)
    columns = want.sum(0)
    grid = splash.grid(ranges, 1024, (512, 512), "dkv")
    assert grid == splash.Grid(2 * int(columns.max()), 2, int(columns.sum()))


@pytest.mark.parametrize("ranges", MASKS[:4], ids=str)
def test_visible_tiles(ranges):
    """Those of 128 × 128 with a visible pair; of sink tokens alone 16 keys count."""
    shape = dataclasses.replace(
        case("causal-8k"), length=1024, window=ranges.window, num_sink_tokens=ranges.num_sink_tokens
    )
    plain = dataclasses.replace(ranges, num_sink_tokens=0)
    tiles = visible(plain, 1024).reshape(8, 128, 8, 128).any((1, 3))
    far = (~tiles[:, 0]).sum() * 128 * 16 if ranges.num_sink_tokens else 0
    assert limits.visible_pairs(shape) == tiles.sum() * 128**2 + far


def test_matmul_limits():
    """Causal, 8k: 64 · 65 / 2 tiles of 128 × 128, two or five matmuls, 131,072 FLOPs per cycle."""
    pairs = limits.visible_pairs(case("causal-8k"))
    assert pairs == 2080 * 128**2
    v5e, v6e = chips.tpu("v5e"), chips.tpu("v6e")
    assert limits.cycles(v5e, pairs, 128, "forward") == 133_120
    assert limits.cycles(v5e, pairs, 128, "backward") == 332_800
    # A matrix unit of 256 is half empty where a product sums over a head of 128.
    assert limits.cycles(v6e, pairs, 128, "forward") == 133_120 / 4 * 1.5
    assert limits.cycles(v5e, pairs, 64, "dq") == limits.cycles(v5e, pairs, 128, "dq") * 5 / 6
    assert limits.cycles(v6e, pairs, 256, "dkv") == 2 * limits.cycles(v6e, pairs, 256, "forward")


SMALL = case("sink-window-8k")


def kernel(name, cycles, *, tiles=(), skipped=(), bundles=900, parts=None, spills=3):
    return Kernel(name, bundles, cycles, spills, list(tiles), list(skipped), [], parts)


def ours(forward=32 * 50_000, tile=5000, matmuls=1280, bundles=900):
    return Built(
        0.7, 9.0, 3 << 20,
        [
            kernel("jvp_sinkjax_flash_forward_.1", forward, tiles=[(tile, 7 * 32, matmuls)], bundles=bundles),
            kernel("transpose_jvp_sinkjax_flash_backward__.1", 32 * 90_000,
                   tiles=[(5000, 8 * 32, 3000), (2000, 32, 2500)]),
        ],
        [kernel("fusion.1", 6400)],
    )  # fmt: skip


def theirs(case=SMALL, sizes=(512, 512)):
    kernels = []
    for name, tile, matmuls in (("fwd", 1187, 512), ("dq", 1613, 768), ("dkv", 1927, 1024)):
        grid = splash.grid(case.ranges, 8192, sizes, name)
        parts = splash.Parts(loop=100, tile=tile, edge=300.5)
        cycles = int(32 * (grid.steps * 100 + grid.rows * 300.5)) + 77
        kernels.append(
            kernel(f"splash_mha_{name}_x.1", cycles, skipped=[(tile, 32 * grid.steps, matmuls)],
                   parts=dataclasses.asdict(parts))
        )  # fmt: skip
    return Built(1.5, 3.0, 250 << 20, kernels, [])


JOB = Job(SMALL.name, 8192, "splash", dict.fromkeys(splash.KERNELS, (512, 512)))


def test_rows():
    v5e = chips.tpu("v5e")
    forward, backward = schedule.our_rows(SMALL, v5e, ours(), JOB)
    assert (forward.blocks, forward.bundles_per_tile, forward.cycles) == (7, 5000, 50_000)
    assert (backward.blocks, backward.bundles_per_tile) == (9, round((8 * 5000 + 2000) / 9, 1))
    assert forward.xla_cycles == 200 and forward.temp_bytes == 3 << 20
    forward, backward = schedule.splash_rows(SMALL, v5e, theirs(), JOB)
    assert forward.blocks == 58  # of the 64 of 16 rows of 4
    assert forward.cycles == 64 * 100 + 58 * 1187 + 16 * 300.5
    assert backward.blocks == 2 * 58
    assert backward.cycles == (64 + 256) * 100 + 58 * (1613 + 1927) + 32 * 300.5
    assert forward.mxu_floor == 58 * 512**2 * 2 * 2 * 128 / 131_072
    keys = ["case", "chip", "pass", "implementation", "bundles_per_tile", "blocks", "cycles", "mxu_floor",
            "spills", "temp_bytes", "build_seconds"]  # fmt: skip
    assert set(keys) <= set(json.loads(json.dumps(backward.as_json())))


def test_a_longer_case_follows_from_the_closed_form():
    longer = case("sink-window-131k")
    forward, backward = schedule.splash_rows(longer, chips.tpu("v5e"), theirs(), JOB)
    assert forward.blocks == 256 * 4 - 6
    assert backward.cycles == (256 * 4 + 256**2) * 100 + 1018 * (1613 + 1927) + 512 * 300.5
    assert forward.build_seconds is forward.temp_bytes is forward.xla_cycles is None


def test_counts_that_cannot_be_right_are_errors():
    v5e = chips.tpu("v5e")
    with pytest.raises(schedule.ScheduleError, match="the tiles need"):
        schedule.our_rows(SMALL, v5e, ours(matmuls=600), JOB)
    with pytest.raises(schedule.ScheduleError, match="no forward kernel"):
        schedule.our_rows(SMALL, v5e, dataclasses.replace(ours(), kernels=ours().kernels[1:]), JOB)
    wrong = dataclasses.replace(theirs(), kernels=[
        dataclasses.replace(k, cycles=int(k.cycles * 1.5)) for k in theirs().kernels
    ])  # fmt: skip
    with pytest.raises(schedule.ScheduleError, match="its parts give"):
        schedule.splash_rows(SMALL, v5e, wrong, JOB)


def test_parts_of_a_splash_kernel():
    program = llo.Program("splash_mha_fwd", 99, {}, frozenset(), {}, (), ())
    grid = splash.Grid(steps=64, rows=16, blocks=58)

    def parts(**changes):
        pieces = [(0, 10, 1, 0), (10, 30, 4 * 64 + 2, 0), (30, 80, 4 * 64, 0), (80, 99, 4 * 16, 0)]
        found = walk.Walk(
            program, 0, tuple(walk.Straight(*p) for p in pieces),
            (walk.Skipped(99, 199, 4 * 64, 384),), (),
        )  # fmt: skip
        return splash.parts(dataclasses.replace(found, **changes), grid, heads=4)

    assert parts() == splash.Parts(loop=70, tile=100, edge=19)
    shared = walk.Straight(0, 8, 2 * 16, 0)  # once per two heads
    assert parts(parts=(shared,)).edge == 4
    with pytest.raises(schedule.ScheduleError, match="ran 37 times"):
        parts(parts=(walk.Straight(0, 8, 37, 0),))
    with pytest.raises(schedule.ScheduleError, match="one tile"):
        parts(skipped=())


def rows_of(name, chip, ours, theirs, floor=1.0, **changes):
    rows = schedule.our_rows(SMALL, chips.tpu("v5e"), globals()["ours"](), JOB)
    return [
        dataclasses.replace(
            r, case=name, chip=chip, implementation=by, cycles=cycles, mxu_floor=floor, **changes
        )
        for by, cycles in (("sinkjax", ours), ("splash", theirs))
        for r in rows
    ]


def test_verdicts():
    ok, missed = schedule.ratios(rows_of("sink-window-32k", "v6e", 37.0, 100.0))
    assert (ok.verdict, ok.most, missed.verdict, missed.most) == ("ok", 0.38, "missed", 0.23)
    (same, _) = schedule.ratios(rows_of("causal-8k", "v5e", 60.0, 100.0, floor=75.0))
    assert same.value == 0.75 and same.verdict == "ok" and same.note == "matrix units limit sinkjax"
    (free, _) = schedule.ratios(rows_of("causal-8k", "tpu7x", 60.0, 100.0))
    assert free.most is None and free.verdict == ""
    bounds = schedule.bounds(
        rows_of("sink-window-32k", "v5e", 1.0, 1.0, program=12_001, temp_bytes=257 << 20)
    )
    assert [b.verdict for b in bounds] == ["missed"] * 3
    slow = schedule.bounds(rows_of("sink-window-131k", "v5p", 1.0, 1.0, build_seconds=1.1))
    assert [b.verdict for b in slow] == ["ok", "ok", "missed"]


TURNS = ({"a": (1, 2, 3), "b": (1, 2)}, {"both": (False, True)})
PARTS = {"forward": ("a", "both"), "backward": ("b", "both")}


def costs(settings):
    """Least at a = 2 and b = 1; `both` costs forward less than it saves backward, where b = 2 fails."""
    a, b, both = settings["a"], settings["b"], settings["both"]
    forward = 1 + 0.1 * abs(a - 2) + 0.02 * both
    return {} if both and b == 2 else {"forward": forward, "backward": 0.9 + 0.1 * b - 0.05 * both}


def descend(costs=costs, **start):
    seen = []

    def score(trials):
        seen.extend(x for some in trials.values() for x in some)
        return {chip: [costs(x) for x in some] for chip, some in trials.items()}

    return descent.descend({"v5e": start}, TURNS, PARTS, score)["v5e"], seen


def test_a_search_finds_the_least_of_each_part():
    found, seen = descend(a=1, b=1, both=False)
    assert found == {"a": 2, "b": 1, "both": True}
    assert {"a": 2, "b": 2, "both": False} in seen  # one trial tells of a and of b
    assert len(seen) == len({tuple(x.items()) for x in seen}) < 12  # of all settings there are 12
    assert descend(a=3, b=2, both=False)[0] == found


def test_a_search_stays_for_little_and_for_failures():
    def little(x):
        return {"forward": 1 - 0.004 * (x["a"] == 2), "backward": 1.0}

    start = {"a": 1, "b": 1, "both": False}
    assert descend(little, **start)[0] == start
    assert (
        descend(lambda x: {"forward": 1.0, "backward": 1.0} if x == start else {}, **start)[0]
        == start
    )


def test_a_failure_of_one_part_is_not_the_others():
    """a = 3 is best and b = 2 fails with whatever it is compiled."""

    def only_a(x):
        return {} if x["b"] == 2 else {"forward": 2 - 0.1 * x["a"], "backward": 1.0}

    assert descend(only_a, a=1, b=1, both=False)[0] == {"a": 3, "b": 1, "both": False}


def with_blocks(job):
    """`ours()`, of which query = 512 makes the forward pass faster, rows = 512 its program too long."""
    blocks = job.blocks
    assert job.implementation == "sinkjax" and blocks is not None
    if blocks["keys_backward"] == 512:
        return "ValueError: no room"
    cycles = 32 * (45_000 if blocks["query"] == 512 else 50_000 - 9000 * (blocks["rows"] == 512))
    return ours(cycles, bundles=12_001 if blocks["rows"] == 512 else 900)


def test_the_command_finds_our_blocks(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pool, "compile_all", lambda jobs, *_: {
        (chip, pool.key(job)): with_blocks(job) for chip, some in jobs.items() for job in some
    })  # fmt: skip
    path = tmp_path / "rows.jsonl"
    arguments = ["blocks", "--case", SMALL.name, "--chip", "v5e", "--json", str(path)]
    assert cli.main([*arguments, "--processes", "1"]) == 0
    said = capsys.readouterr().out
    best = dataclasses.replace(BLOCKS["v5e"], query=512)
    assert f'    "v5e": {our_blocks.as_call(vars(best))},' in said
    assert re.search(r"left out: .*rows=512.*: forward has 12,001 bundles", said)
    assert re.search(r"left out: .*keys_backward=512.*no room", said)
    forward, backward = (json.loads(line) for line in path.read_text().splitlines())
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    assert (forward["cycles"], forward["cycles_shipped"]) == (45_000, 50_000)
    assert Blocks(**forward["blocks"]) == best and backward["cycles"] == backward["cycles_shipped"]
    monkeypatch.setattr(pool, "compile_all", lambda jobs, *_: {
        (chip, pool.key(job)): "ValueError: no" for chip, some in jobs.items() for job in some
    })  # fmt: skip
    assert cli.main(["blocks", "--chip", "v5e"]) == 1
    assert "sink-window-8k on v5e, shipped blocks: ValueError: no" in capsys.readouterr().out


def test_blocks_are_written_as_the_table_has_them():
    assert our_blocks.as_call(vars(Blocks())) == "Blocks()"
    for blocks in BLOCKS.values():
        assert eval(our_blocks.as_call(vars(blocks))) == blocks


def test_the_shipped_blocks_are_of_all_chips_and_in_the_sweep():
    assert set(BLOCKS) == {c.name for c in chips.TPUS} == set(TPUS.values())
    values = {field: some for turn in our_blocks.TURNS for field, some in turn.items()}
    assert set(values) == set(vars(Blocks()))
    for blocks in BLOCKS.values():
        assert all(x in values[field] for field, x in vars(blocks).items())
    assert {field for fields in our_blocks.PARTS.values() for field in fields} == set(values)


def test_splash_is_compared_at_sizes_that_were_swept(monkeypatch):
    """All cases on all chips with targets; the search takes the fewest cycles of each kernel."""
    for chip in (c.name for c in chips.TPUS):
        for one in CASES:
            assert (chip, one.name) in splash_blocks.BLOCKS
            sizes = splash_blocks.sizes_for(chip, one)
            assert {x for pair in sizes.values() for x in pair} <= set(splash_blocks.SWEPT)
    best = {"fwd": (256, 512), "dq": (1024, 256), "dkv": (512, 512)}

    def built(job):
        kernels = []
        for name in splash.KERNELS:
            parts = splash.Parts(
                loop=1.0, tile=1.0 if job.sizes[name] == best[name] else 99.0, edge=0.0
            )
            kernels.append(kernel(f"splash_mha_{name}", 1, parts=dataclasses.asdict(parts)))
        return Built(0.0, kernels=kernels)

    monkeypatch.setattr(pool, "compile_all", lambda jobs, *_: {
        (chip, pool.key(job)): built(job) for chip, some in jobs.items() for job in some
    })  # fmt: skip
    rows, errors = splash_blocks.search([SMALL, case("sink-window-32k")], ["v6e"], 1)
    assert not errors and {r["kernel"]: r["sizes"] for r in rows} == best and len(rows) == 6
    assert splash_blocks.as_source(rows).splitlines()[1] == (
        '    ("v6e", "sink-window-32k"): ((256, 512), (1024, 256), (512, 512)),'
    )


def test_targets_are_of_cases_that_exist():
    assert {name for name, _ in schedule.TARGETS} <= {c.name for c in CASES}
    assert {which for _, which in schedule.TARGETS} == set(schedule.PASSES)


@pytest.mark.parametrize("most, status", [(0.65, 0), (0.6, 1)])
def test_the_command_prints_and_writes_and_tells(most, status, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pool, "compile_all", lambda jobs, *_: {
        (chip, pool.key(job)): ours() if job.implementation == "sinkjax" else theirs()
        for chip, some in jobs.items() for job in some
    })  # fmt: skip
    monkeypatch.setitem(schedule.TARGETS, (SMALL.name, "forward"), (most,) * 3)
    monkeypatch.setattr(schedule, "jobs_for", lambda *_: (Job(SMALL.name, 8192, "sinkjax"), JOB))
    path = tmp_path / "rows.jsonl"
    arguments = ["schedule", "--case", SMALL.name, "--chip", "v5e", "--json", str(path)]
    assert cli.main(arguments) == status
    said = capsys.readouterr().out
    assert "MXU floor" in said and ("1 of" in said) == bool(status)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["implementation"], r["pass"]) for r in rows] == [
        (by, which) for by in ("sinkjax", "splash") for which in ("forward", "backward")
    ]


def test_a_call_that_does_not_compile_is_named(monkeypatch, capsys):
    monkeypatch.setattr(pool, "compile_all", lambda jobs, *_: {
        (chip, pool.key(job)): "ValueError: no" for chip, some in jobs.items() for job in some
    })  # fmt: skip
    assert cli.main(["schedule", "--case", SMALL.name, "--chip", "v6e"]) == 1
    assert f"{SMALL.name} on v6e, splash: ValueError: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["schedule", "--case", "sink"], "invalid choice: 'sink'.*sink-window-8k"),
        (["schedule", "--chip", "v4"], "invalid choice: 'v4'.*tpu7x"),
        (["blocks", "--processes", "0"], "expected at least 1, got 0"),
        (["time", "--length", "0"], "expected at least 1, got 0"),
        ([], "required: command"),
    ],
)
def test_bad_input_is_named(arguments, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert re.search(reason, capsys.readouterr().err)


def test_unknown_names(capsys):
    assert cli.main(["time", "--implementation", "flash"]) == 2
    assert "pallas_tpu" in capsys.readouterr().out
    with pytest.raises(ValueError, match="v5e, v5p, v6e, tpu7x, got 'v4'"):
        chips.tpu("v4")


def test_devices_by_kind():
    assert chips.limits("NVIDIA H200").bandwidth == 4.8e12
    assert chips.limits("TPU v5 lite").peak == 197e12
    assert chips.limits("TPU v5p").peak == 229.5e12
    assert chips.limits("cpu") == chips.Limits(None, None)


def test_lines_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    table.write_lines(path, [{"a": 1}])
    with pytest.raises(TypeError):
        table.write_lines(path, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n' and list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_times_are_measured_and_checked_first(monkeypatch, capsys, tmp_path):
    """On the CPU, of a tiny case; an implementation that is wrong is named and not timed."""
    from sinkjax_kernels.flash import rows

    right = rows.attention

    def wrong(query, *others, **options):
        out, lse = right(query, *others, **options)
        return out * 1.1, lse

    monkeypatch.setattr(rows, "attention", wrong)
    path = tmp_path / "times.jsonl"
    status = cli.main(
        ["time", "--case", "sink-window-128-8k", "--length", "257", "--heads", "2", "--repetitions", "2",
         "--implementation", "xla", "rows", "jax.nn", "reference", "splash", "--json", str(path)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 1
    assert re.search(r"rows forward: wrong, not timed: .*out 1\.0e-01", said)
    assert "splash: skipped: needs a tpu, this is a cpu" in said
    found = [json.loads(line) for line in path.read_text().splitlines()]
    measured = {(r["implementation"], r["pass"]) for r in found}
    both = {"forward", "forward+backward"}
    names = ("xla", "jax.nn", "reference")
    assert measured == {(n, p) for n in names for p in both} | {("reference", "decode")}
    for row in found:
        assert row["milliseconds"] > 0 and row["deviation"] < 1e-2
        if row["pass"] != "decode" and row["implementation"] != "jax.nn":
            assert row["times_jax_nn"] > 0 and row["times_causal"] > 0


TWO_HEADS = {"implementation": "splash", "length": 8192, "heads": (2, 2)}


@pytest.mark.tpu_aot
def test_the_method_gives_what_it_gave_elsewhere():
    """Splash at 512 × 512, P = 4, W = 1024 on v5e: 87k, 100k and 140k per head with libtpu 0.0.52."""
    job = Job(SMALL.name, sizes=dict.fromkeys(splash.KERNELS, (512, 512)), **TWO_HEADS)
    built = pool.compile_all({"v5e": [job]})["v5e", pool.key(job)]
    assert isinstance(built, Built), built
    for name, known in (("fwd", 87_000), ("dq", 100_000), ("dkv", 140_000)):
        (found,) = (k for k in built.kernels if f"mha_{name}" in k.name)
        grid = splash.grid(SMALL.ranges, 8192, (512, 512), name)
        assert 0.85 * known < splash.Parts(**found.splash).cycles(grid) < 1.15 * known


@pytest.mark.tpu_aot
def test_a_call_is_compiled_with_the_blocks_it_is_given():
    """Whole blocks of queries of the forward pass: the shipped ones are of another size."""
    shipped = vars(BLOCKS["v6e"])
    other = shipped | {"query": shipped["query"] // 2}
    some = [
        Job(SMALL.name, 4096, "sinkjax", heads=(4, 1), blocks=blocks)
        for blocks in (None, dict(shipped), other)
    ]
    built = pool.compile_all({"v6e": some}, 1)
    tiles = []
    for job in some:
        found = built["v6e", pool.key(job)]
        assert isinstance(found, Built), found
        (forward,) = (k for k in found.kernels if "forward" in k.name)
        tiles.append(forward.tiles)
    assert tiles[0] == tiles[1]
    assert 2 * sum(n for _, n, _ in tiles[0]) == sum(n for _, n, _ in tiles[2])


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", [c.name for c in chips.TPUS])
def test_the_command_on_a_real_case(chip, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    cli.main(["schedule", "--case", "sink-window-128-8k", "--chip", chip, "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4, capsys.readouterr().out
    ours = {r["pass"]: r for r in rows if r["implementation"] == "sinkjax"}
    theirs = {r["pass"]: r for r in rows if r["implementation"] == "splash"}
    for which in schedule.PASSES:
        assert ours[which]["mxu_floor"] * 0.8 < ours[which]["cycles"] < theirs[which]["cycles"]
        assert ours[which]["program"] <= schedule.LONGEST_PROGRAM
