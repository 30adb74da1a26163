"""The report of a compiled program: its parts against the program's own arrays, its estimates against hand calculation."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from llmos_jax.compiler import hlo
from llmos_jax.compiler import report as reports
from llmos_jax.compiler.hlo_cost import cost
from llmos_jax.compiler.program import OutOfMemory
from llmos_jax.compiler.report import Report
from llmos_jax.compiler.roofline import train_flops
from llmos_jax.compiler.target import Target
from llmos_jax.plan.programs import Serving, build, plan
from pallas_kernels import KVPages, paged_attention, quantize, quantized_matmul
from pallas_kernels.cpu import matmul
from pallas_kernels.native import native
from tests import tiny

BATCH, LENGTH = 8, 16
CONFIG = tiny.run(tiny.DENSE, BATCH, LENGTH, steps=40)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.parse("cpu:8").with_price(2.0)


@pytest.fixture(scope="module")
def found(target: Target) -> Report:
    return plan(CONFIG, target, "train", Serving())


def on_a_device(tree) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def test_the_parts_of_the_memory_sum_to_what_the_compiler_states(found: Report, target: Target):
    program, _ = build(CONFIG, target, "train", Serving())
    executable = program.compile()
    assert (
        found.peak_bytes == pytest.approx(sum(found.memory.values())) == pytest.approx(executable.peak_bytes, rel=0.01)
    )
    state, batch = program.args
    assert found.memory["parameters"] == pytest.approx(on_a_device(state.params), rel=0.01)
    assert found.memory["optimizer state"] == pytest.approx(on_a_device(state.opt_state), rel=0.01)
    assert found.memory["batch"] == pytest.approx(on_a_device(batch), rel=0.01) == 5 * LENGTH * 4
    held = executable.memory
    assert found.memory["temporaries"] == held.temp + held.output - held.alias  # results that take no argument's place
    assert found.headroom_bytes == found.capacity_bytes - found.peak_bytes and found.fits


def test_a_report_survives_json(found: Report):
    written = found.as_dict()
    assert json.loads(json.dumps(written)) == written
    assert written["fits"] is True and written["step_seconds"] == found.main.seconds
    fields = {field.name for field in dataclasses.fields(Report)}
    assert fields < set(written)


def test_three_estimates_and_what_follows_from_them(found: Report, target: Target):
    assert list(found.estimates) == ["analytic", "roofline", "schedule"]
    assert found.main == found.estimates["schedule"]
    assert 0 < found.estimates["roofline"].seconds <= found.estimates["schedule"].seconds
    for one in found.estimates.values():
        assert 0 < one.core <= one.seconds
        assert all(
            one.exposed[axis] <= moved * 1.0001 for axis, moved in one.communication.items() if axis in one.exposed
        )
    useful = train_flops(CONFIG.model, LENGTH) * BATCH / 8
    seconds = found.main.seconds
    assert found.useful_flops == pytest.approx(useful)
    assert found.main.mfu == pytest.approx(useful / seconds / target.chip.peak_flops("float32"))
    assert found.tokens_per_second_per_chip == pytest.approx(BATCH * LENGTH / seconds / 8)
    assert found.dollars_per_run == pytest.approx(8 * 2.0 * seconds * 40 / 3600)
    assert found.dollars_per_million_tokens == pytest.approx(8 * 2.0 * seconds / 3600 / (BATCH * LENGTH) * 1e6)
    # Recomputation apart, a program does at least the products that its user asked for.
    assert found.flops >= 0.9 * useful


def test_traffic_is_by_kind_and_axes(found: Report):
    over = {one.axes for one in found.traffic}
    assert over == {"fsdp"} and {one.kind for one in found.traffic} >= {"all-gather"}
    assert found.mesh == {"fsdp": 8}
    assert [one.bytes for one in found.traffic] == sorted((one.bytes for one in found.traffic), reverse=True)


def test_one_device_moves_nothing():
    found = plan(CONFIG, Target.parse("cpu:1"), "train", Serving())
    assert found.traffic == [] and found.mesh == {} and len(found.estimates) == 3
    assert all(not any(one.communication.values()) for one in found.estimates.values())
    assert found.dollars_per_run is None and found.dollars_per_million_tokens is None


def test_what_the_compiler_refuses_is_reported_by_formula(target: Target):
    program, work = build(CONFIG, target, "train", Serving())
    formula = {"seconds": 2.0, "core": 1.0, "communication": {}, "exposed": {}, "mfu": 0.1}
    found = reports.refused(program, OutOfMemory(1e15), target, work, formula)
    state, _ = program.args
    assert found.memory["temporaries"] == 1e15 and not found.fits and found.headroom_bytes < 0
    assert found.memory["parameters"] == on_a_device(state.params)
    assert found.main.seconds == 2.0 and found.flops == 0 and found.notes
    assert json.loads(json.dumps(found.as_dict()))["fits"] is False


@pytest.mark.skipif(not native().tiles, reason="this machine has no kernels of ours")
def test_calls_out_of_a_cpu_program_count_their_work():
    """Products by their dimensions; attention, whose work follows from lengths, by what the plan says of it."""
    pages = KVPages(jnp.zeros((4, 1, 2, 16, 32), jnp.uint16))
    table, one, starts = (jnp.zeros(shape, jnp.int32) for shape in ((1, 4), (1,), (2,)))
    w = jnp.zeros((32, 96), jnp.bfloat16)
    codes = quantize(jnp.zeros((96, 64)), axis=-1)

    def step(x, pages):
        q = matmul(x, w)
        out, pages = paged_attention(q.reshape(8, 3, 32), *(q[:, None, :32],) * 2, pages, table, one, starts, 1)
        return quantized_matmul(jnp.tile(out[:, 0], 2), codes, activations="int8"), pages

    program = jax.jit(step).lower(jnp.zeros((8, 32), jnp.bfloat16), pages).compile().as_text()
    module = hlo.parse(program)
    products = 2 * 8 * 32 * 96 + 2 * 8 * 64 * 96
    assert cost(module).flops == products and any("paged_attention" in what for what in cost(module).unknown)
    told = cost(reports._told(module, {"paged_attention": (1e6, 10.0)}))
    assert told.flops == products + 1e6 and not told.unknown
