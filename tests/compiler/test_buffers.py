"""Buffers alive at the worst moment, against sums by hand and against the compiler's own account."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llmos_jax.compiler import buffers, hlo
from llmos_jax.config import MeshConfig
from llmos_jax.train.step import train_program
from tests import tiny

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)
SIZE = 256 * 256 * 4


def peak(function, *args, donate=(), names=()):
    compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    return buffers.peak(hlo.parse(compiled.as_text()), names), compiled.memory_analysis()


def account(memory) -> int:
    """The compiler's bytes of everything: on a CPU its `peak_memory_in_bytes` leaves out the temporaries."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def test_arguments_have_the_names_that_are_given():
    found, _ = peak(lambda a, b: a @ b, X, X, names=["weights.up"])
    assert found.argument_bytes == 2 * SIZE and found.bytes == 3 * SIZE
    assert {b.label for b in found.buffers} >= {"weights.up", "argument 1", "dot_general"}
    assert sum(b.bytes for b in found.buffers) == found.bytes


def test_a_donated_argument_is_used_again():
    kept, _ = peak(lambda a, b: a + b, X, X)
    donated, _ = peak(lambda a, b: a + b, X, X, donate=(0,))
    assert kept.bytes == 3 * SIZE and donated.bytes == 2 * SIZE


def test_values_die_after_their_last_use():
    def chain(x):
        for _ in range(5):
            x = jnp.sin(x @ x)  # one product is read while the next is written
        return x

    found, memory = peak(chain, X)
    assert found.bytes == pytest.approx(account(memory), rel=0.05)
    assert found.bytes <= 4 * SIZE


def test_the_state_of_a_loop_is_there_once():
    def loop(x, w):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return x, x

        return jax.lax.scan(layer, x, w)

    stack = jax.ShapeDtypeStruct((12, 256, 256), jnp.float32)
    found, memory = peak(loop, X, stack, names=["x", "layers"])
    assert found.bytes == pytest.approx(account(memory), rel=0.05)
    largest = found.buffers[:2]
    assert [b.bytes for b in largest] == [12 * SIZE] * 2 and largest[0].shape == "f32[12,256,256]"
    assert "while" in found.at[0]
    assert {b.label for b in largest} == {"layers", "loop / tanh"}  # what is stacked, not the zeros it begins as


def test_equal_buffers_are_one_line():
    def fan(x):
        with jax.named_scope("branches"):
            parts = [x @ (x + i) for i in range(4)]
        return [jnp.flip(part) for part in parts]

    found, _ = peak(fan, X)
    branches = [b for b in found.buffers if b.number > 1]
    assert branches and all(b.bytes == b.number * SIZE for b in branches)


@pytest.mark.parametrize("options", [{}, {"remat": "none"}, {"scan_layers": False}])
def test_a_train_step_against_the_compilers_account(options):
    base = tiny.model(num_layers=4, embed_dim=64, mlp_dim=256, vocab_size=512, **options)
    program = train_program(tiny.run(base, mesh=MeshConfig(fsdp=1), seq_len=32), tiny.mesh(fsdp=1))
    compiled = program.lower().compile()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(program.args)]
    found = buffers.peak(hlo.parse(compiled.as_text()), names)
    assert found.bytes == pytest.approx(account(compiled.memory_analysis()), rel=0.05)
    assert any("params" in b.label for b in found.buffers)


def test_padding_and_memory_spaces_of_a_tpu():
    """x and the result in HBM, x's copy and all of the loop's state but the weights in VMEM: not counted.

    The TPU compiler's own peak was 67,110,912 bytes.
    """
    module = hlo.parse((Path(__file__).parent / "tpu_scan.hlo.txt").read_text())
    found = buffers.peak(module, ["x", "weights"])
    assert found.argument_bytes == 2048 * 2048 * 2 + 6 * 1024 * 2048 * 2
    assert [b.label for b in found.buffers[:2]] == ["weights", "x"]


def test_asynchronous_collectives_hold_one_buffer_each():
    """The gathered weights of the second product are in the start, in the fusion that carries them and in the done."""
    module = hlo.parse((Path(__file__).parent / "tpu_async_scan.hlo.txt").read_text())
    found = buffers.peak(module)
    assert found.bytes == pytest.approx(704_645_632, rel=0.05)  # the TPU compiler's peak


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(step)/transpose(jvp())/while/body/closed_call/attention/dot_general", "backward / loop / attention"),
        ("jit(step)/jvp()/while/body/closed_call/dot_general", "forward / loop / dot_general"),
        ("jit(step)/jvp(attention)/mul", "forward / attention"),
        ("jit(step)/transpose(jvp(mlp))/dot_general", "backward / mlp"),
        ("jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/mul", "recomputation / loop / mlp"),
        ("jit(step)/add", "add"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("", "unnamed"),
    ],
)
def test_readable_names(name: str, expected: str):
    assert buffers.readable(name) == expected


FUSION_IN_A_FUSION = """HloModule nested, is_scheduled=true

%inner (p: f32[1,8]) -> f32[1,8] {
  %p = f32[1,8]{1,0} parameter(0)
  ROOT %c = f32[1,8]{1,0} copy(%p)
}

%outer (stack: f32[4,8], row: f32[1,8], at: s32[]) -> f32[4,8] {
  %stack = f32[4,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %copied = f32[1,8]{1,0} fusion(%row), kind=kLoop, calls=%inner
  ROOT %dus = f32[4,8]{1,0} dynamic-update-slice(%stack, %copied, %at, %zero)
}

%body (state: (s32[], f32[4,8], f32[1,8])) -> (s32[], f32[4,8], f32[1,8]) {
  %state = (s32[], f32[4,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %kept = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %x = f32[1,8]{1,0} get-tuple-element(%state), index=2
  %made = f32[1,8]{1,0} negate(%x), metadata={op_name="jit(step)/mlp/neg"}
  %written = f32[4,8]{1,0} fusion(%kept, %made, %i), kind=kLoop, calls=%outer, metadata={op_name="jit(step)/dynamic_update_slice"}
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[1,8]{1,0}) tuple(%i, %written, %made)
}

%more (state: (s32[], f32[4,8], f32[1,8])) -> pred[] {
  %state = (s32[], f32[4,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(4)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[1,8], stack: f32[4,8], i: s32[]) -> f32[4,8] {
  %x = f32[1,8]{1,0} parameter(0)
  %stack = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zeros = f32[4,8]{1,0} copy(%stack)
  %begin = (s32[], f32[4,8]{1,0}, f32[1,8]{1,0}) tuple(%i, %zeros, %x)
  %loop = (s32[], f32[4,8]{1,0}, f32[1,8]{1,0}) while(%begin), condition=%more, body=%body
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_stack_is_named_by_what_is_written_through_a_fusion_in_a_fusion():
    found = buffers.peak(hlo.parse(FUSION_IN_A_FUSION), ["x", "stack", "i"])
    assert "jit(step)/mlp/neg" in {b.op_name for b in found.buffers if b.shape == "f32[4,8]"}
