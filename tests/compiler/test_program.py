"""A program is compiled without arrays, knows its bytes, and never compiles again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compiler.program import Program
from llmos_jax.sharding import replicated, sharding
from tests import tiny

SIZE = 256 * 256 * 4


def program(axes: dict[str, int], donate: tuple[int, ...] = ()) -> Program:
    mesh = tiny.mesh(**axes)
    place = sharding(mesh, ("embed", "mlp"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=place)
    return Program("add", lambda a, b: a + b, (x, x), mesh, donate, place)


def test_it_runs_and_is_named():
    executable = program({"data": 1}).compile()
    x = jnp.ones((256, 256))
    np.testing.assert_array_equal(executable(x, x), 2 * x)
    assert executable.name == "add" and executable.compile_seconds > 0
    assert "compiled" not in repr(executable)


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


def test_without_shardings_the_compiler_chooses():
    mesh = tiny.mesh(data=1)
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(mesh))
    np.testing.assert_array_equal(Program("double", lambda a: a * 2, (x,), mesh).compile()(jnp.ones(4)), 2 * np.ones(4))
