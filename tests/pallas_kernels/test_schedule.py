"""The reader of the TPU compiler's dump, on a stored one: 8 x 8 blocks, each a loop of 4 products, v6e."""

import importlib.util
import sys
from pathlib import Path

import pytest

from pallas_kernels import schedule

DUMP = Path(__file__).parent / "schedule_dump"
SCRIPT = Path(__file__).parents[2] / "scripts" / "kernel_schedule.py"


@pytest.fixture(scope="module")
def small():
    [kernel] = schedule.read(DUMP)  # the program around it, which names the kernel too, is not one
    return kernel


@pytest.mark.compat
def test_loops_and_branches_nest_as_in_the_kernel(small):
    assert small.name == "small.1"
    assert small.bundles == 188
    assert [(r.kind, r.first, r.last) for r in small.kernel.walk()] == [
        ("kernel", 0, 188),
        ("loop", 14, 182),  # over blocks
        ("branch", 78, 164),  # not in the pipeline's first and last step
        ("branch", 90, 92),  # a row's first block
        ("loop", 93, 133),
        ("branch", 138, 144),  # a row's last block
    ]


def test_trips_are_the_constant_bounds(small):
    grid, inner = small.loops
    assert grid.trips == 8 * 8 + 2  # and the two steps that fill and drain the pipeline
    assert inner.trips == 4


def test_every_bundle_is_in_one_region_alone(small):
    assert sum(region.own for region in small.kernel.walk()) == small.bundles
    assert small.kernel.total("MXU") == small.hot.slots["MXU"] == 4


def test_the_hot_region_holds_the_products(small):
    assert (small.hot.kind, small.hot.bundles) == ("loop", 40)
    assert small.hot.share("MXU") == pytest.approx(4 / (2 * 40))


def test_cycles_leave_out_branches_without_products(small):
    grid, _ = small.loops
    step = grid.own + 38 + 4 * 40  # of the branch around the inner loop 38 are its own
    assert small.cycles() == (188 - 168) + 66 * step
    assert small.cycles({14: 1, 93: 2}) == (188 - 168) + grid.own + 38 + 2 * 40


def test_memory_and_spills(small):
    assert small.vmem == 0x12000 + 8 * 128 * 4 + 2 * (8 * 128 * 4 + 512 * 128 * 4 + 8 * 128 * 4)
    assert (small.spills, small.fills) == (0, 0)
    assert small.summary()["unknown_trips"] == 0


def _text(loop_bound="8", masking=("nop",)):
    """A loop of two bodies, each behind a branch: one of two products, one that also masks."""
    body = ["nop"] * 4  # the delay slots of the branch
    lines = [
        "{ %s1 = smov 0 }",
        f"LB: > {{ %p1 = scmp.ge.s32.totalorder %s2, {loop_bound} /* loop exit test */ }}",
        ": > { %s2 = sadd.s32 2, %s1 ;; %9 = sbr.rel (%p7) target = $region5 }",
        *(f": > {{ {op} }}" for op in [*body, "vmatmul", "vmatmul"]),
        ": > { %9 = sbr.rel (%p8) target = $region6 } /* Start region 5 */",
        *(f": > {{ {op} }}" for op in [*body, "vmatmul", "vmatmul", *masking]),
        "PF: > { nop } /* Start/End empty region 6 */",
        ": > { %3 = sbr.rel (!%p1) target = $region9 }",
        *[":  {}"] * 4,
        ":  {} /* exit bundle */",
    ]
    lines[0] = f": {lines[0]}"
    used = ["2 0" if "vmatmul" in line else "0 1" for line in lines[:-1]]
    text = "\n".join(f"  {at:#x} {line}" for at, line in enumerate(lines))
    return text, "\n".join(["== CAPACITY:", "MXU, SALU", "    2     2", "== UTILIZATION:", *used])


def test_of_a_body_written_twice_the_cheapest_counts():
    kernel = schedule.parse("twice", *_text(masking=["nop"] * 3))
    [loop] = kernel.loops
    assert loop.trips == 4  # it counts in twos
    assert [branch.bundles for branch in loop.inside] == [2, 5]
    assert loop.last == kernel.bundles - 1  # the branch back and its delay slots are the loop's
    assert kernel.cycles() == 2 + 4 * (loop.own + 2)
    assert kernel.hot == loop.inside[0]


def test_bodies_of_different_products_all_count():
    kernel = schedule.parse("two", *_text(masking=["vmatmul"]))
    [loop] = kernel.loops
    assert kernel.cycles() == 2 + 4 * (loop.own + 2 + 3)


@pytest.mark.compat
def test_a_computed_bound_has_no_trips():
    kernel = schedule.parse("ragged", *_text("%s77"))
    assert [loop.trips for loop in kernel.loops] == [None]
    assert kernel.cycles({1: 10}) - kernel.cycles() == pytest.approx(9 * kernel.cycles() - 9 * 2)


def test_a_row_of_the_comparison(small):
    spec = importlib.util.spec_from_file_location("kernel_schedule", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["kernel_schedule"] = script
    spec.loader.exec_module(script)
    [ours, *_] = script.COMPARISONS["attention.forward"].sides
    asked = [{"kernel": "attention.forward", "key": "", "candidates": [], "chosen": {"q": 64, "kv": 10}}]
    [row] = script.rows("v6e", "attention.forward", ours, {}, schedule.Outcome({}, [small], "", asked))
    assert row.per_1000 == pytest.approx(1000 * 40 / 640)
    assert "q=64 kv=10" in script.table([row])


def test_a_builder_is_found_by_module_or_by_file(tmp_path):
    (tmp_path / "some.py").write_text("def build(n):\n    return abs, (n,)\n")
    assert schedule.load(f"{tmp_path / 'some.py'}:build")(3) == (abs, (3,))
    assert schedule.load("pallas_kernels.schedule:load") is schedule.load


def test_a_failed_compile_says_why(tmp_path):
    (tmp_path / "some.py").write_text("def build():\n    raise ValueError('block_q=7 is odd')\n")
    with pytest.raises(schedule.CompileError, match="block_q=7 is odd"):
        schedule.compile_apart("v6e", f"{tmp_path / 'some.py'}:build", {})


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler (pip install jax[tpu])")
def test_a_kernel_compiled_here(tmp_path):
    (tmp_path / "kernel.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "from jax.experimental import pallas as pl\n"
        "def body(x, y, out):\n"
        "    out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)\n"
        "def build(n):\n"
        "    x = jax.ShapeDtypeStruct((n, 256), jnp.bfloat16)\n"
        "    y = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)\n"
        "    specs = [pl.BlockSpec((256, 256), lambda i: (i, 0)), pl.BlockSpec((256, 256), lambda i: (0, 0))]\n"
        "    shape = jax.ShapeDtypeStruct((n, 256), jnp.float32)\n"
        "    out = pl.BlockSpec((256, 256), lambda i: (i, 0))\n"
        "    call = pl.pallas_call(body, grid=(n // 256,), in_specs=specs, out_specs=out, out_shape=shape)\n"
        "    return call, (x, y)\n"
    )
    [kernel] = schedule.schedule("v6e", f"{tmp_path / 'kernel.py'}:build", n=65536)
    assert kernel.kernel.total("MXU") > 0
    assert kernel.loops[0].trips == 65536 // 256 + 2
