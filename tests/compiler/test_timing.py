"""The schedule of small programs written by hand, played through on a chip whose numbers are round."""

import pytest

from llmos_jax.compiler import hlo
from llmos_jax.compiler.chips import MEMORY_SHARE, Chip
from llmos_jax.compiler.interconnect import AxisLinks, Span
from llmos_jax.compiler.timing import HBM_LINK, HOST_LINK, Timing, timing

MESH = {"data": 2, "fsdp": 2}
CHIP = Chip(
    "round", "round", "tpu", bf16=1e12, f32=1e12, memory_bandwidth=1e9, clock_hz=1e9, host_bandwidth=1e9, matmul_share=0.5
)  # fmt: skip
LINKS = {axis: AxisLinks(axis, 2, (Span("x", 2, bandwidth=1e9),), 1e9, 1e9, 0.0) for axis in MESH}

HEAD = "HloModule hand, is_scheduled=true, num_partitions=4\n"
OVER = {"fsdp": "{{0,1},{2,3}}", "data": "{{0,2},{1,3}}", "both": "{{0,1,2,3}}", "odd": "{{0,3},{1,2}}"}
# 4 MB a device, 8 MB gathered, half of which comes in at 1 GB/s.
GATHER = 4e-3


def work(name: str, milliseconds: int) -> str:
    config = f'backend_config={{"estimated_cycles":"{milliseconds * 10**6}"}}'
    return f"  %{name} = f32[8]{{0}} add(%small, %small), {config}\n"


def gather(name: str, axis: str = "fsdp", start: bool = False) -> str:
    inside = f"(%p), channel_id=1, replica_groups={OVER[axis]}, use_global_device_ids=true, dimensions={{0}}\n"
    rows = 4000 if axis == "both" else 2000
    whole = f"f32[{rows},1000]{{1,0}}"
    if start:
        return f"  %{name} = (f32[1000,1000]{{1,0}}, {whole}) all-gather-start{inside}"
    return f"  %{name} = {whole} all-gather{inside}"


def done(name: str) -> str:
    return f"  %{name}.done = f32[2000,1000]{{1,0}} all-gather-done(%{name})\n"


def entry(*lines: str) -> str:
    parameters = "  %p = f32[1000,1000]{1,0} parameter(0)\n  %small = f32[8]{0} parameter(1)\n"
    head = "ENTRY %main (p: f32[1000,1000], small: f32[8]) -> f32[8] {\n"
    return head + parameters + "".join(lines) + "  ROOT %out = f32[8]{0} bitcast(%small)\n}\n"


def played(*texts: str, **options) -> Timing:
    return timing(hlo.parse(HEAD + "\n".join(texts)), CHIP, LINKS, MESH, **options)


def test_the_core_waits_for_a_collective_that_nothing_runs_beside():
    found = played(entry(work("before", 1), gather("g"), work("after", 3)))
    assert found.seconds == pytest.approx(4e-3 + GATHER)
    assert found.core == found.cycles == pytest.approx(4e-3)
    assert found.busy == found.exposed == {("fsdp",): pytest.approx(GATHER)}


@pytest.mark.parametrize(("milliseconds", "waited"), [(1, 3e-3), (4, 0.0), (6, 0.0)])
def test_what_runs_beside_a_collective_is_not_waited_for(milliseconds: int, waited: float):
    found = played(entry(gather("g", start=True), work("beside", milliseconds), done("g"), work("after", 2)))
    assert found.exposed[("fsdp",)] == pytest.approx(waited, abs=1e-12)
    assert found.seconds == pytest.approx(max(GATHER, milliseconds * 1e-3) + 2e-3)
    assert found.busy == {("fsdp",): pytest.approx(GATHER)}


def test_links_of_one_axis_take_turns_and_those_of_two_do_not():
    def two(axis: str) -> Timing:
        lines = gather("a", start=True), gather("b", axis, start=True), work("beside", 5), done("a"), done("b")
        return played(entry(*lines))

    same, other = two("fsdp"), two("data")
    assert same.seconds == pytest.approx(2 * GATHER) and same.exposed[("fsdp",)] == pytest.approx(2 * GATHER - 5e-3)
    assert other.seconds == pytest.approx(5e-3) and sum(other.exposed.values()) == 0


def test_what_is_started_and_never_waited_for_is_over_at_the_end():
    assert played(entry(gather("g", start=True), work("beside", 1))).seconds == pytest.approx(GATHER)


def test_an_exchange_over_two_axes_takes_them_one_after_the_other():
    """16 MB, of which half comes in over the first axis; then 8 MB over the second, half of which is there."""
    found = played(entry(gather("g", "both")))
    assert found.busy == {("data", "fsdp"): pytest.approx(8e-3 + 4e-3)}


def test_groups_that_are_no_whole_axes_take_the_slowest_links():
    found = played(entry(gather("g", "odd")))
    assert found.busy == {("data", "fsdp"): pytest.approx(GATHER)}


def loop(trips: int) -> tuple[str, str]:
    body = (
        "%body (t: (s32[], f32[1000,1000], f32[8])) -> (s32[], f32[1000,1000], f32[8]) {\n"
        "  %t = (s32[], f32[1000,1000]{1,0}, f32[8]{0}) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%t), index=0\n"
        "  %p = f32[1000,1000]{1,0} get-tuple-element(%t), index=1\n"
        "  %small = f32[8]{0} get-tuple-element(%t), index=2\n"
        + gather("inner", start=True)
        + work("beside", 3)
        + done("inner")
        + "  ROOT %next = (s32[], f32[1000,1000]{1,0}, f32[8]{0}) tuple(%i, %p, %small)\n}\n"
        "%condition (t.1: (s32[], f32[1000,1000], f32[8])) -> pred[] {\n"
        "  %t.1 = (s32[], f32[1000,1000]{1,0}, f32[8]{0}) parameter(0)\n"
        "  ROOT %go = pred[] constant(true)\n}\n"
    )
    run = (
        "  %zero = s32[] constant(0)\n"
        "  %start = (s32[], f32[1000,1000]{1,0}, f32[8]{0}) tuple(%zero, %p, %small)\n"
        "  %while = (s32[], f32[1000,1000]{1,0}, f32[8]{0}) while(%start), condition=%condition, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}\n'
    )
    return body, run


@pytest.mark.parametrize("trips", [1, 7])
def test_a_loop_takes_its_body_as_often_as_it_runs(trips: int):
    body, run = loop(trips)
    found = played(body, entry(work("before", 2), run))
    assert found.seconds == pytest.approx(2e-3 + trips * GATHER)
    assert found.core == pytest.approx(2e-3 + trips * 3e-3)
    assert found.busy[("fsdp",)] == pytest.approx(trips * GATHER)
    assert found.exposed[("fsdp",)] == pytest.approx(trips * (GATHER - 3e-3))


def test_copies_to_the_hosts_memory_run_over_its_link():
    host = (
        "  %away = (f32[1000,1000]{1,0:S(5)}, f32[1000,1000]{1,0}, u32[]) copy-start(%p)\n",
        "  %away.done = f32[1000,1000]{1,0:S(5)} copy-done(%away)\n",
    )
    found = played(entry(host[0], work("beside", 1), host[1]))
    moved = 1000 * 1000 * 4 / 1e9
    assert found.busy == {HOST_LINK: pytest.approx(moved)}
    assert found.exposed == {HOST_LINK: pytest.approx(moved - 1e-3)}


def test_copies_onto_the_chip_ahead_of_their_use_run_beside_the_core():
    """From HBM, which the 4 MB leave at a share of 1 GB/s."""
    near = "  %c = (f32[1000,1000]{1,0:S(1)}, f32[1000,1000]{1,0}, u32[]) copy-start(%p)\n"
    found = played(entry(near, work("beside", 1), "  %c.done = f32[1000,1000]{1,0:S(1)} copy-done(%c)\n"))
    assert found.busy == {HBM_LINK: pytest.approx(4e-3 / MEMORY_SHARE)}
    assert found.seconds == pytest.approx(4e-3 / MEMORY_SHARE) and found.core == pytest.approx(1e-3)


def test_without_cycles_arithmetic_and_bytes_are_taken_by_formula():
    """[1000, 1000] squared: 2 GFLOP at half of 1 TFLOP/s, 12 MB at a share of 1 GB/s; the longer of the two."""
    product = "  %dot.1 = f32[1000,1000]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    slow_memory = played(entry(product))
    assert slow_memory.seconds == pytest.approx(12e6 / 1e9 / MEMORY_SHARE)
    assert slow_memory.uncounted == {"dot": 1} and slow_memory.cycles == 0
    module = hlo.parse(HEAD + entry(product))
    fast = Chip("fast", "fast", "tpu", bf16=1e12, f32=1e12, memory_bandwidth=1e15, matmul_share=0.5)
    assert timing(module, fast, LINKS, MESH).seconds == pytest.approx(2e9 / 0.5e12)
    assert timing(module, fast, LINKS, MESH, roofline=True).seconds == pytest.approx(2e9 / 1e12)


def test_the_roofline_leaves_the_compilers_cycles_aside():
    """An addition of 8 numbers that is said to take 3 ms: 96 bytes at peak."""
    found = played(entry(work("long", 3)), roofline=True)
    assert found.cycles == 0 and found.seconds == pytest.approx(96 / 1e9)
