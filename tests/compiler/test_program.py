"""A program is compiled without arrays, knows its bytes, and never compiles again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compiler.program import Program
from llmos_jax.sharding import replicated, sharding
from tests import tiny

SIZE = 256 * 256 * 4


def add(a, b):
    return a + b


def scaled(factor, a):
    return a * factor


def program(axes: dict[str, int], donate: tuple[int, ...] = ()) -> Program:
    mesh = tiny.mesh(**axes)
    place = sharding(mesh, ("embed", "mlp"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)
    return Program("add", add, (), (x, x), mesh, donate, place)


def test_it_runs_and_is_named():
    executable = program({"data": 1}).compile()
    x = jnp.ones((256, 256))
    np.testing.assert_array_equal(executable(x, x), 2 * x)
    assert executable.name == "add" and executable.compile_seconds > 0
    assert "compiled=" not in repr(executable)
    assert "f32[256,256]" in executable.hlo


@pytest.mark.usefixtures("eight_devices")
def test_results_are_laid_out_as_told():
    program_8 = program({"fsdp": 4, "tensor": 2})
    executable = program_8.compile()
    x = jax.device_put(jnp.ones((256, 256)), program_8.out_shardings)
    assert executable(x, x).sharding == program_8.out_shardings
    assert executable.peak_bytes == pytest.approx(3 * SIZE / 8, rel=0.01)  # bytes of one device


def test_a_donated_buffer_is_counted_once_and_used_up():
    plain, donated = (program({"data": 1}, donate).compile() for donate in ((), (0,)))
    assert plain.peak_bytes == pytest.approx(3 * SIZE, rel=0.01)
    assert donated.peak_bytes == pytest.approx(2 * SIZE, rel=0.01)
    x, y = jnp.ones((256, 256)), jnp.ones((256, 256))
    donated(x, y)
    assert x.is_deleted() and not y.is_deleted()


def test_arguments_of_another_shape_are_an_error():
    executable = program({"data": 1}).compile()
    with pytest.raises(TypeError, match="differ from the types"):
        executable(jnp.ones((256, 128)), jnp.ones((256, 128)))


def test_static_values_come_first_and_are_fixed():
    mesh = tiny.mesh(data=1)
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(mesh))
    for factor in (2, 3):
        tripled = Program("scaled", scaled, (factor,), (x,), mesh, donate=(0,)).compile()
        np.testing.assert_array_equal(tripled(jnp.ones(4)), factor * np.ones(4))


def test_options_reach_the_compiler():
    mesh = tiny.mesh(data=1)
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(mesh))
    bad = Program("scaled", scaled, (2,), (x,), mesh, options=(("no_such_option", True),))
    with pytest.raises(Exception, match="no_such_option"):
        bad.compile()


def test_a_function_must_be_found_by_its_name():
    mesh = tiny.mesh(data=1)

    def inner(a):
        return a

    for function, name in ((inner, "inner"), (lambda a: a, "lambda"), (jnp.ones(3).sum, "sum")):
        with pytest.raises(ValueError, match=f"{name}.*is not a function of a module"):
            Program("x", function, (), (), mesh)


def test_static_values_must_be_hashable():
    with pytest.raises(ValueError, match=r"not hashable: \[1\]"):
        Program("x", scaled, ([1],), (), tiny.mesh(data=1))  # type: ignore[arg-type]
