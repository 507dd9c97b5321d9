"""What a scheduled program's text says: trips, bytes, cycles, and what hides behind what."""

# ruff: noqa: E501
from __future__ import annotations

import dataclasses

import pytest

from t5x_lite.planning import hlo, timing
from t5x_lite.planning.chips import Slice
from t5x_lite.types import InputError

# One turn of the loop: a product of 1,000 cycles, and a gather of 4 KiB that starts before it.
TEXT = """
HloModule jit_f, is_scheduled=true

%body (p.0: (s32[], bf16[512]{0})) -> (s32[], bf16[512]{0}) {
  %p.0 = (s32[]{:T(128)}, bf16[512]{0}) parameter(0)
  %x.1 = bf16[512]{0} get-tuple-element(%p.0), index=1
  %gather-start.1 = (bf16[512]{0}, bf16[2048]{0}) all-gather-start(%x.1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %product.1 = bf16[64,64]{1,0} fusion(%x.1), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/jvp(M)/layers/mlp/wi/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}}
  %gather-done.1 = bf16[2048]{0} all-gather-done(%gather-start.1), metadata={op_name="jit(f)/gather"}
  ROOT %t.1 = (s32[]{:T(128)}, bf16[512]{0}) tuple(%p.0)
}

%fused (a.0: bf16[512]) -> bf16[64,64] {
  %a.0 = bf16[512]{0} parameter(0)
  %l.1 = bf16[64,8]{1,0} bitcast(%a.0)
  %r.1 = bf16[8,64]{1,0} bitcast(%a.0)
  ROOT %dot.1 = bf16[64,64]{1,0} convolution(%l.1, %r.1), dim_labels=bf_io->bf
}

%cond (p.1: (s32[], bf16[512]{0})) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[512]{0}) parameter(0)
  %n.1 = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x: bf16[512]) -> bf16[512] {
  %x = bf16[512]{0:T(8,128)} parameter(0)
  %start.1 = (s32[]{:T(128)}, bf16[512]{0}) tuple(%x)
  %while.1 = (s32[]{:T(128)}, bf16[512]{0}) while(%start.1), condition=%cond, body=%body
  %sum.1 = f32[1000]{0} add(%x, %x), metadata={op_name="jit(f)/transpose(jvp(M))/add"}, backend_config={"window_config":{"estimated_cycles":"900000","cost_model_type":"COST_MODEL_TYPE_INVALID"}}
  ROOT %all.1 = f32[256]{0} all-reduce(%sum.1), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%fused
}
"""


def machine(clock=1e6, flops=1e12, hbm=1e6, link=1e6):
    return timing.Machine(clock, flops, hbm, 4, lambda chips: link)


def test_a_loop_costs_its_turns_and_hides_what_it_can():
    program = hlo.Program.parse(TEXT)
    assert (program.entry, len(program.computations)) == ("main", 4)
    times = timing.estimate(program, machine())
    gather = 4096 * 3 / 4 / 1e6  # seconds on the links, of which 1,000 cycles are hidden
    adds = (4000 + 2 * 1024) / 1e6  # by bytes, for the cycles are a guess
    reduce_ = 1024 * 2 / 2 / 1e6
    assert times.compute == pytest.approx(5 * 1e-3 + adds)
    assert times.exposed == pytest.approx(5 * (gather - 1e-3) + reduce_)
    assert times.total == times.compute + times.exposed
    assert times.by_source["mlp/wi/dot_general"] == pytest.approx(5e-3)
    assert times.by_source["backward add"] == pytest.approx(adds)
    found = times.traffic["all-gather"]
    assert (found.count, found.sent) == (5, 5 * 4096 * 3 / 4)
    assert times.traffic["all-reduce"].sent == 1024


def test_turns_in_front_of_a_loop_are_not_the_loops():
    given = "%start.1 = (s32[]{:T(128)}, bf16[512]{0}) tuple(%x)"
    text = TEXT.replace(
        given,
        f"""%one.1 = s32[] constant(2)
  %copy.1 = s32[]{{:T(128)}} copy(%one.1)
  {given.replace("(%x)", "(%copy.1, %x)")}""",
    )
    times = timing.estimate(hlo.Program.parse(text), machine())
    assert times.by_source["mlp/wi/dot_general"] == pytest.approx(3e-3)  # turns 2, 3 and 4


def test_a_fast_link_hides_all():
    times = timing.estimate(hlo.Program.parse(TEXT), machine(link=1e9))
    assert times.exposed == pytest.approx(1024 / 1e9)  # of the reduction, which nothing hides


def test_arrays_that_go_together_count_whole():
    """Of a tuple all parts are sent; what starts a gather names what it sends beside the results."""
    reduced = "(f32[256]{0}, bf16[512]{0}, f32[1024]{0}) all-reduce(%sum.1)"
    text = TEXT.replace("f32[256]{0} all-reduce(%sum.1)", reduced)
    assert text != TEXT
    times = timing.estimate(hlo.Program.parse(text), machine())
    assert times.traffic["all-reduce"].sent == 1024 + 1024 + 4096
    gathers = "((bf16[512]{0}, f32[8]{0}), (bf16[2048]{0}, f32[32]{0})) all-gather-start(%x.1)"
    text = TEXT.replace("(bf16[512]{0}, bf16[2048]{0}) all-gather-start(%x.1)", gathers)
    assert text != TEXT
    times = timing.estimate(hlo.Program.parse(text), machine())
    assert times.traffic["all-gather"].sent == 5 * (4096 + 128) * 3 / 4


def test_a_cautious_estimate_believes_every_cycle():
    program = hlo.Program.parse(TEXT)
    hopeful, cautious = (
        timing.estimate(program, dataclasses.replace(machine(), cautious=flag))
        for flag in (False, True)
    )
    assert cautious.by_source["backward add"] == pytest.approx(0.9)  # 900,000 cycles
    assert cautious.by_source["mlp/wi/dot_general"] == hopeful.by_source["mlp/wi/dot_general"]
    assert cautious.exposed == pytest.approx(hopeful.exposed)


def test_no_product_is_faster_than_the_chip():
    slow = machine(flops=1e6)
    times = timing.estimate(hlo.Program.parse(TEXT), slow)
    assert times.by_source["mlp/wi/dot_general"] == pytest.approx(5 * 2 * 64 * 8 * 64 / 1e6)


def test_kernels_are_the_greater_of_both_rooflines():
    line = """
ENTRY %main (x: bf16[512]) -> bf16[512] {
  %x = bf16[512]{0} parameter(0)
  ROOT %k.1 = bf16[512]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"5000000"}}
}
"""
    program = hlo.Program.parse(line)
    assert timing.estimate(program, machine(flops=1e6)).compute == pytest.approx(5.0)
    assert timing.estimate(program, machine()).compute == pytest.approx(2048 / 1e6)


def test_splash_attention_is_known():
    line = """
ENTRY %main (q: bf16[2,4,256,64]) -> bf16[2,4,256,64] {
  %q = bf16[2,4,256,64]{3,2,1,0} parameter(0)
  ROOT %splash_mha_dkv.1 = bf16[2,4,256,64]{3,2,1,0} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"
}
"""
    found = timing.estimate(hlo.Program.parse(line), machine(flops=1e6, hbm=1e12)).compute
    assert found == pytest.approx(5 * 2 * 2 * 4 * 256 * 256 * 64 / 1e6)


def test_a_kernel_is_named_by_its_place_though_its_line_is_broken():
    source = "shard_map/vmap(sparse)/jit(f)/splash_mha_fwd/splash_mha_fwd/pallas_call"
    line = f"""
ENTRY %main (q: bf16[2,4,256,64]) -> bf16[2,4,256,64] {{
  %q = bf16[2,4,256,64]{{3,2,1,0}} parameter(0)
  ROOT %splash_mha_fwd.1 = bf16[2,4,256,64]{{3,2,1,0}} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"blocks"
}}}}, metadata={{op_name="jit(step)/jvp(T)/while/body/self_attention/{source}"}}
}}
"""
    found = timing.estimate(hlo.Program.parse(line), machine()).by_source
    taken = {name for name, seconds in found.items() if seconds > 0}
    assert taken == {"self_attention/splash_mha_fwd/pallas_call"}


def test_what_is_in_the_chips_own_memory_is_not_moved():
    line = TEXT.replace("%x = bf16[512]{0:T(8,128)}", "%x = bf16[512]{0:T(8,128)S(1)}")
    times = timing.estimate(hlo.Program.parse(line), machine())
    assert times.by_source["backward add"] == pytest.approx(4000 / 1e6)


# 1,000 numbers are fetched while 3,000 cycles compute, and put back at the end.
OFFLOADED = """
ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0:T(1024)S(5)} parameter(0)
  %y = f32[1000]{0:T(1024)S(1)} parameter(1)
  %near.1 = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%y)
  %copy-start.1 = (f32[1000]{0:T(1024)}, f32[1000]{0:T(1024)S(5)}, u32[]{:S(2)}) copy-start(%x)
  %product.1 = f32[8,8]{1,0:S(1)} fusion(%y), kind=kOutput, calls=%none, metadata={op_name="jit(f)/product"}, backend_config={"window_config":{"estimated_cycles":"3000","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}}
  %copy-done.1 = f32[1000]{0:T(1024)} copy-done(%copy-start.1), metadata={op_name="jit(f)/fetch"}
  %copy-start.2 = (f32[1000]{0:T(1024)S(5)}, f32[1000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%copy-done.1)
  ROOT %copy-done.2 = f32[1000]{0:T(1024)S(5)} copy-done(%copy-start.2)
}
"""


def test_copies_of_the_hosts_memory_take_pcie():
    slow = dataclasses.replace(machine(hbm=1e12), host_bandwidth=1e6)
    times = timing.estimate(hlo.Program.parse(OFFLOADED), slow)
    assert times.compute == pytest.approx(3e-3, rel=1e-3)
    assert times.exposed == pytest.approx(4e-3 - 3e-3 + 4e-3, rel=1e-3)
    assert times.by_source["waiting: fetch"] == pytest.approx(1e-3, rel=1e-2)
    for kind in (hlo.FROM_HOST, hlo.TO_HOST):
        assert (times.traffic[kind].count, times.traffic[kind].sent) == (1, 4000), kind
    assert set(times.traffic) == {hlo.FROM_HOST, hlo.TO_HOST}  # the chip's own memory is no host


def test_a_layer_comes_out_of_a_stack_on_the_host():
    """A fourth of what all of the stack would be, by the same way."""
    line = next(line for line in OFFLOADED.splitlines() if "copy-start(%x)" in line)
    start = (
        "  %dynamic-slice-start.1 = ((f32[4,250]{1,0:T(4,128)S(5)}, s32[], s32[]), "
        "f32[1,250]{1,0:T(1,128)}, u32[]{:S(2)}) dynamic-slice-start(%x, %i, %i)"
    )
    text = OFFLOADED.replace(line, start).replace(
        "copy-done(%copy-start.1)", "dynamic-slice-done(%dynamic-slice-start.1)"
    )
    slow = dataclasses.replace(machine(hbm=1e12), host_bandwidth=1e5)
    times = timing.estimate(hlo.Program.parse(text), slow)
    traffic = times.traffic[hlo.FROM_HOST]
    assert (traffic.count, traffic.sent) == (1, 1000)
    assert times.by_source["waiting: fetch"] == pytest.approx(1e-2 - 3e-3, rel=1e-2)


def test_both_ways_of_pcie_are_used_at_once():
    """What is put back doesn't wait for what is being fetched, nor that for collectives."""
    fetch = next(line for line in OFFLOADED.splitlines() if "copy-start(%x)" in line)
    more = fetch.replace("copy-start.1", "copy-start.3")
    text = OFFLOADED.replace("  %copy-start.2", f"{more}\n  %copy-start.2")
    assert text != OFFLOADED
    slow = dataclasses.replace(machine(hbm=1e12), host_bandwidth=1e6)
    once, twice = (timing.estimate(hlo.Program.parse(one), slow) for one in (OFFLOADED, text))
    assert twice.exposed == pytest.approx(once.exposed, rel=1e-3)
    assert twice.traffic[hlo.FROM_HOST].sent == 2 * once.traffic[hlo.FROM_HOST].sent


# A reduction over all chips of two slices: added up in each, then between them while one turn of a
# loop, with a transfer of its own in it, and a product pass.
BETWEEN = """
%body (p.0: (s32[], f32[256]{0})) -> (s32[], f32[256]{0}) {
  %p.0 = (s32[], f32[256]{0}) parameter(0)
  %y.1 = f32[256]{0} get-tuple-element(%p.0), index=1
  %token.1 = token[] after-all()
  %send.1 = (f32[256]{0}, u32[], token[]) send(%y.1, %token.1), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="gather_0",_xla_megascale_target={{100000,200000},{100001,200001}},_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.1 = (f32[512]{0}, u32[], token[]) recv(%token.1), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="gather_0"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1, is_host_transfer=true
  %recv-done.1 = (f32[512]{0}, token[]) recv-done(%recv.1), channel_id=2, is_host_transfer=true
  ROOT %t.1 = (s32[], f32[256]{0}) tuple(%p.0)
}

%cond (p.1: (s32[], f32[256]{0})) -> pred[] {
  %n.1 = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%n.1, %n.1), direction=LT
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %scatter.1 = f32[256]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %token = token[] after-all()
  %send = (f32[256]{0}, u32[], token[]) send(%scatter.1, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="reduce_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[256]{0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="reduce_0"}
  %start = (s32[], f32[256]{0}) tuple(%scatter.1)
  %while = (s32[], f32[256]{0}) while(%start), condition=%cond, body=%body
  %product = bf16[64,64]{1,0} fusion(%x), kind=kOutput, calls=%sum, metadata={op_name="jit(f)/dot"}, backend_config={"window_config":{"estimated_cycles":"100","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}}
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %recv-done = (f32[256]{0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %y = f32[256]{0} get-tuple-element(%recv-done), index=0
  ROOT %gather.1 = f32[1024]{0} all-gather(%y), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def between(dcn, text=BETWEEN):
    slow = dataclasses.replace(machine(), slices=2, dcn_bandwidth=dcn)
    return timing.estimate(hlo.Program.parse(text), slow)


def test_transfers_between_slices_take_the_network():
    times = between(1e5)
    gather = 1024 / 1e5  # half of 2 KiB, nothing hides it
    reduce_ = 2 * 1024 / 2 / 1e5  # of a chip's quarter of the sums
    inside = 2 * 4096 * 3 / 4 / 1e6  # the scatter and the gather within each slice
    # The loop lasts as long as its transfers, in which those from before wait their turn.
    assert times.between == pytest.approx(3 * gather + (reduce_ - 100 / 1e6))
    assert times.exposed == pytest.approx(times.between + inside)
    assert times.network == pytest.approx(3 * gather + reduce_)
    assert times.by_source["waiting: between slices"] == pytest.approx(times.between)
    found = {kind: (one.count, one.sent, one.seconds) for kind, one in times.traffic.items()}
    assert found == {
        "reduce-scatter": (1, 3072, pytest.approx(inside / 2)),
        "all-gather": (1, 3072, pytest.approx(inside / 2)),
        "all-reduce between slices": (1, 1024, pytest.approx(reduce_)),
        "all-gather between slices": (3, 3072, pytest.approx(3 * gather)),
    }


def test_a_fast_network_hides_behind_products():
    assert between(1e9).between == pytest.approx(3 * 1024 / 1e9)  # what stands alone in the loop


@pytest.mark.parametrize(
    ("kind", "target", "sent"),
    [
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', 2 * 3 / 4 * 1024),
        ("ALL_REDUCE", '"{1:8}x{0:3}"', 2 * 7 / 8 * 1024),
        ("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"', 3 / 4 * 1024),
        ("ALL_TO_ALL", "{{100000,200000,300000,400000},{100001,2,3,4}}", 3 / 4 * 1024),
        ("ALL_GATHER", '"{1,2,3,4}x{0:3}"', 3 * 1024),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", 1024),
    ],
)
def test_what_a_chip_sends_to_other_slices(kind, target, sent):
    given = '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    text = BETWEEN.replace(given, f'{target},_xla_megascale_transfer_type="{kind}"')
    assert text != BETWEEN
    named = {"ONE_TO_ONE": "collective-permute"}.get(kind, kind.lower().replace("_", "-"))
    one = between(1e5, text.replace("constant(3)", "constant(0)")).traffic[
        f"{named} between slices"
    ]
    assert one.sent == pytest.approx(sent)


def test_slices_by_name():
    slice_ = Slice.parse("v5e:4x4")
    assert (slice_.size, str(slice_)) == (16, "v5e:4x4")
    link = slice_.chip.link_bandwidth
    assert [slice_.ring_bandwidth(n) / link for n in (2, 4, 16)] == [2, 2, 4]
    two = Slice.parse("v5e:4x4", 2)
    assert (two.size, two.machine.chips, str(two)) == (32, 16, "2 slices of v5e:4x4")
    # Google's figures are in bits, of a pod of 256 chips or of one chip.
    dcn = {kind: Slice.parse(f"{kind}:4x4").machine.dcn_bandwidth for kind in ("v5e", "v5p", "v6e")}
    assert dcn == {"v5e": 6.4e12 / 8 / 256, "v5p": 50e9 / 8, "v6e": 25.6e12 / 8 / 256}
    with pytest.raises(InputError, match="num_slices=0: expected a positive number"):
        Slice.parse("v5e:4x4", 0)
    for wrong in ("v5e", "v9:4x4", "v5e:4", "v5e:4x4x4x4"):
        with pytest.raises(InputError, match="expected a chip and the sides"):
            Slice.parse(wrong)
