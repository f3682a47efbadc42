"""Reading optimised HLO: two pieces of real programs, shortened, and what they say about themselves."""

import re
from pathlib import Path

import pytest

from sinkjax.plan.collectives import collectives, group_size, totals
from sinkjax.plan.hlo import Instruction, parse, shapes
from sinkjax.plan.loops import conditionals, runs, trip_count, unknown_loops
from sinkjax.plan.work import flops, traffic

HERE = Path(__file__).parent
GATHERS = (HERE / "gathers.hlo.txt").read_text()  # v5p:4x4x8, FSDP, a gather in steps
PERMUTES = (HERE / "permutes.hlo.txt").read_text()  # v5e:4x4, a gather decomposed into permutes

# Of the first: one gather of [32, 8, 128] to [4096, 8, 128] in bfloat16 by 128 devices.
SHARD, WHOLE = 32 * 8 * 128 * 2, 4096 * 8 * 128 * 2


def entry(*lines, name="main"):
    rows = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\nENTRY %{name} (p: f32[2]) -> f32[2] {{\n{rows}\n}}\n"


def test_shapes_of_tuples_with_tiles_and_memory_spaces():
    text = "(bf16[1,32,8]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}, f8e4m3fn[3]{0}, s4[6])"
    found = shapes(text)
    assert [shape.dims for shape in found] == [(1, 32, 8), (), (3,), (6,)]
    assert [shape.space for shape in found] == [1, 2, 0, 0]
    assert [shape.nbytes for shape in found] == [512, 4, 3, 3]


def test_instructions_have_operands_attributes_and_a_root():
    module = parse(GATHERS)
    assert module.entry == "main.5_spmd" and len(module.computations) == 9
    body = module.computations["async_collective_fusion.336"]
    assert body.root.opcode == "tuple" and body.root.operands[3] == "all-gather.144"
    assert body.by_name["convolution.143"].operands == ("fusion.340", "param_25.2")
    assert body.parameters[4].name == "param_25.2"
    start = module.computations["wide.region_6.12_spmd"].by_name["async-collective-start"]
    assert start.called == ("fused_computation.401",) and len(start.shapes) == 4
    with pytest.raises(ValueError, match="ENTRY computation, got none"):
        parse("HloModule m\n")


def test_rounds_of_loops_from_their_counters():
    for text, rounds in ((GATHERS, 32), (PERMUTES, 4)):  # 0, 1, ... 31 and 0, 2, 4, 6
        module = parse(text)
        main = module.computations[module.entry]
        loop = next(row for row in main.instructions if row.opcode == "while")
        assert trip_count(module, main, loop) == rounds and unknown_loops(module) == 0
        assert sorted(times for _, times in runs(module)) == [1.0, rounds, rounds]


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        (("constant(32)", "constant(30)"), 30),
        (("constant(0)\n  %copy.12", "constant(-2)\n  %copy.12"), 34),
        (("direction=LT", "direction=LE"), 33),
        (("compare(%get-tuple-element.1762, %constant.372.clone.3), direction=LT",
          "compare(%constant.372.clone.3, %get-tuple-element.1762), direction=GT"), 32),
        (("body=%wide.region_6.12_spmd", 'body=%wide.region_6.12_spmd, '
          'backend_config={"known_trip_count":{"n":"7"}}'), 7),
        (("add(%get-tuple-element.2050, %constant.411)",
          "multiply(%get-tuple-element.2050, %constant.411)"), None),
    ],
)  # fmt: skip
def test_rounds_follow_the_text(change, rounds):
    text = GATHERS.replace(*change)
    assert text != GATHERS
    module = parse(text)
    main = module.computations[module.entry]
    assert trip_count(module, main, main.by_name["while.49"]) == rounds
    assert unknown_loops(module) == (rounds is None)


def test_a_gather_in_steps_is_one_and_hides_behind_the_product_it_rides_with():
    found = collectives(parse(GATHERS))
    kinds = [(one.kind, one.times, one.asynchronous, one.overlapped) for one in found]
    assert kinds == [
        ("all-gather", 32, False, False),
        ("all-reduce", 32, False, False),
        ("all-gather", 32, True, True),
    ]
    assert found[2].nbytes == 127 * SHARD and found[1].nbytes == 2 * WHOLE * 127 / 128
    assert found[2].source.endswith("closed_call/BTD,DKH->BTKH/dot_general")
    table = totals(found)
    assert table["all-gather"] == {
        "count": 64,
        "bytes": 64 * 127 * SHARD,
        "asynchronous_count": 32,
        "asynchronous_bytes": 32 * 127 * SHARD,
        "overlapped_count": 32,
        "overlapped_bytes": 32 * 127 * SHARD,
    }
    assert table["all-reduce"]["overlapped_bytes"] == 0


def test_steps_that_go_on_in_a_loop_are_counted_where_they_start():
    found = collectives(parse(GATHERS.replace('"flag_start":"-1"', '"flag_start":"2"')))
    assert [one.kind for one in found] == ["all-gather", "all-reduce"]


def test_branches_share_the_runs():
    inner = "%{} (q: f32[6,5]) -> f32[6,6] {{\n  %q.{} = f32[6,5] parameter(0)\n{}\n}}\n\n"
    dot = "  ROOT %d = f32[6,6] dot(%q.0, %q.0), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    none = "  ROOT %z = f32[6,6] broadcast(%q.1), dimensions={}"
    text = entry(
        "%p = f32[6,5] parameter(0)",
        "%i = s32[] parameter(1)",
        "ROOT %c = f32[6,6] conditional(%i, %p, %p), branch_computations={%yes, %no}",
    ).replace("ENTRY", inner.format("yes", 0, dot) + inner.format("no", 1, none) + "ENTRY", 1)
    assert flops(parse(text)) == 6 * 6 * 5 and conditionals(parse(text)) == 1


def test_steps_without_a_product_hide_nothing():
    text = re.sub(r"%convolution.143 = (\S+) convolution\(%fusion.340, \S+\).*", 
                  r"%convolution.143 = \1 copy(%fusion.340)", GATHERS)  # fmt: skip
    chain = collectives(parse(text))[2]
    assert chain.asynchronous and not chain.overlapped


def test_permutes_of_a_decomposed_product():
    found = collectives(parse(PERMUTES))
    size = 256 * 32 * 128 * 2
    assert [(one.kind, one.times, one.nbytes) for one in found] == [
        ("collective-permute", 4, size)
    ] * 2
    # The product runs while the first is under way; the second ends at once.
    assert [one.overlapped for one in found] == [True, False]
    assert all(one.asynchronous for one in found)


def test_starts_and_fusions_that_scatter():
    text = entry(
        "%p = f32[64,3]{1,0} parameter(0)",
        "%s = ((f32[64,3]{1,0}), f32[8,3]{1,0}) async-start(%p), calls=%inner",
        "%k = f32[5] custom-call(%p), custom_call_target=\"tpu_custom_call\"",
        "%u = ((f32[64,3]{1,0}), f32[8,3]{1,0}) async-update(%s)",
        "%d = f32[8,3]{1,0} async-done(%u)",
        "ROOT %f = f32[8,3]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
    )  # fmt: skip
    text = text.replace(
        "ENTRY",
        "%inner (q: f32[64,3]) -> f32[8,3] {\n  %q = f32[64,3]{1,0} parameter(0)\n"
        "  ROOT %r = f32[8,3]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}\n}\n\n"
        "%all-reduce-scatter.1 (q: f32[64,3]) -> f32[8,3] {\n  %q.1 = f32[64,3]{1,0} parameter(0)\n"
        "  %r.1 = f32[64,3]{1,0} all-reduce(%q.1), replica_groups=[2,8]<=[16]\n"
        "  ROOT %t = f32[8,3]{1,0} slice(%r.1)\n}\n\nENTRY",
        1,
    )
    found = collectives(parse(text))
    assert [(one.kind, one.nbytes) for one in found] == [("reduce-scatter", 64 * 3 * 4 * 7 / 8)] * 2
    assert [(one.asynchronous, one.overlapped) for one in found] == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups=mesh['a'=4,'b'=8] {'b'}", 8),
        ("replica_groups=mesh['a'=4,'b'=8] {'a','b'}", 32),
        ("replica_groups=[16,8]<=[8,16]T(1,0)", 8),
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("channel_id=3", 1),
    ],
)
def test_sizes_of_groups(text, size):
    assert group_size(Instruction("a", "f32[2]", "all-gather", (), text)) == size


def test_operations_of_products_by_hand():
    # The padded window of the first is a product of [8192, 4096] and [4096, 8 * 128].
    assert flops(parse(GATHERS)) == 32 * 2 * 8192 * 4096 * 8 * 128
    assert flops(parse(PERMUTES)) == 4 * 2 * 8192 * 256 * 32 * 128
    kernel = '{"custom_call_config":{"cost_estimate":{"flops":"77","bytes_accessed":"13"}}}'
    text = entry(
        "%p = f32[2,3,5]{2,1,0} parameter(0)",
        "%q = f32[2,5,7]{2,1,0} parameter(1)",
        "%d = f32[2,3,7]{2,1,0} dot(%p, %q), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}",
        "%a = bf16[11,5]{1,0} parameter(2)",
        "%r = bf16[11,7]{1,0} ragged-dot(%a, %q, %p), lhs_contracting_dims={1}",
        f'%k = f32[2]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={kernel}',
        "%i = f32[1,9,4]{2,1,0} parameter(3)",
        "%w = f32[3,4,6]{2,1,0} parameter(4)",
        "ROOT %c = f32[1,5,6]{2,1,0} convolution(%i, %w), window={size=3 stride=2 pad=1_1}, "
        "dim_labels=b0f_0io->b0f",
    )
    # A window of 3 at places -1, 1, 3, 5, 7 of 9: one of the 15 taps falls on padding on each side.
    expected = 2 * 2 * 3 * 7 * 5 + 2 * 11 * 7 * 5 + 77 + 2 * 4 * 6 * 13
    assert flops(parse(text)) == expected


def test_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip():
    slices = entry(
        "%p = f32[32,10]{1,0} parameter(0)",
        "%i = s32[] constant(0)",
        "%v = f32[32,10]{1,0:S(1)} parameter(1)",
        "%a = f32[32,10]{1,0} fusion(%p, %i, %v), kind=kLoop, calls=%update",
        "%b = f32[1,10]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,10}",
        "ROOT %c = f32[1,10]{1,0:S(1)} copy(%b)",
    ).replace(
        "ENTRY",
        "%update (q: f32[32,10]) -> f32[32,10] {\n  %q = f32[32,10]{1,0} parameter(0)\n"
        "  %j = s32[] parameter(1)\n  %v.1 = f32[32,10]{1,0:S(1)} parameter(2)\n"
        "  %s = f32[1,10]{1,0} dynamic-slice(%q, %j, %j), dynamic_slice_sizes={1,10}\n"
        "  %n = f32[1,10]{1,0} negate(%s)\n"
        "  ROOT %u = f32[32,10]{1,0} dynamic-update-slice(%q, %n, %j, %j)\n}\n\nENTRY",
        1,
    )
    row = 10 * 4
    # The fusion reads one row, writes one, and a counter; the slice reads and writes; the copy reads.
    assert traffic(parse(slices)) == 2 * row + 4 + 2 * row + row
    kernel = '{"cost_estimate":{"flops":"77","bytes_accessed":"13"}}'
    text = entry(f'ROOT %k = f32[2] custom-call(), custom_call_target="x", backend_config={kernel}')
    assert traffic(parse(text)) == 13
