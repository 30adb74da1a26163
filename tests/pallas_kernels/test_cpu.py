"""Products in the form that a CPU computes fast: the same numbers, and the form indeed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import cpu
from tests.pallas_kernels.host import needs_compiler


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_matmul_and_its_gradients_equal_numpy(dtype, rows):
    x, w, g = (jnp.asarray(a, dtype) for a in (random(rows, 7), random(7, 3, seed=1), random(rows, 3, seed=2)))
    out, pull = jax.vjp(jax.jit(cpu.matmul), x, w)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for got, want in zip((out, *pull(g)), (x64 @ w64, g64 @ w64.T, x64.T @ g64), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max())


@needs_compiler
@settings(max_examples=40)
@given(
    rows=st.sampled_from([1, 6, 31, 32, 200]),
    inputs=st.sampled_from([1, 9, 304, 2115, 2128]),
    outputs=st.sampled_from([1, 33, 1100, 9000]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    a_transposed=st.booleans(),
    b_transposed=st.booleans(),
)
def test_products_by_vectors_equal_numpy(rows, inputs, outputs, dtype, a_transposed, b_transposed):
    shapes = (rows, inputs)[:: -1 if a_transposed else 1], (inputs, outputs)[:: -1 if b_transposed else 1]
    a, b = (jnp.asarray(random(*shape, seed=seed), dtype) for seed, shape in enumerate(shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_by_vectors", lambda *_: True)
        got = cpu.product(a, b, a_transposed=a_transposed, b_transposed=b_transposed)
    a64, b64 = (np.asarray(x, np.float64) for x in (a, b))
    want = (a64.T if a_transposed else a64) @ (b64.T if b_transposed else b64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6 * np.sqrt(inputs), rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("many", "few"), [(700, 100), (31, 5), (9, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_how_many_rows_there_are_changes_no_row(many, few, transposed):
    x, w = jnp.asarray(random(many, 4992), jnp.float32), jnp.asarray(random(4992, 130), jnp.float32)
    w = w.T if transposed else w
    all_rows, some = (cpu.product(rows, w, b_transposed=transposed) for rows in (x, x[:few]))
    np.testing.assert_array_equal(all_rows[:few], some)


@needs_compiler
@pytest.mark.parametrize("transposed", [False, True])
def test_a_decoding_step_reads_float32_weights_by_our_own(transposed):
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((96, 64) if transposed else (64, 96), jnp.float32)
    program = jax.jit(lambda x, w: cpu.matmul_float32(x, w, transposed)).lower(x, w).compile().as_text()
    assert f'custom_call_target="{cpu.FEW_ROWS}"' in program and " dot(" not in program


@needs_compiler
def test_a_large_float32_product_and_its_gradients_are_our_own():
    def gradients(x, w, g):
        return jax.vjp(cpu.matmul, x, w)[1](g)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 96), (64, 96))]
    program = jax.jit(gradients).lower(*shapes).compile().as_text()
    assert program.count(f'custom_call_target="{cpu.VECTORS}"') == 2 and " dot(" not in program


@pytest.mark.parametrize("shape", [(1, 4), (37, 3), (2, 40, 5)])
def test_transpose_swaps_the_last_two(shape):
    x = jnp.asarray(random(*shape), jnp.bfloat16)
    assert (jax.jit(cpu.transpose)(x) == jnp.swapaxes(x, -1, -2)).all()


def test_products_of_a_bfloat16_gradient_take_bfloat16():
    """XLA converts the operands of every form that its fast kernel does not take."""

    def gradients(x, w, g):
        return jax.vjp(cpu.matmul, x, w)[1](g)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 16), (16, 48), (64, 48))]
    program = jax.jit(gradients).lower(*shapes).compile().as_text()
    products = [computation for computation in program.split("\n\n") if " dot(" in computation]
    assert len(products) == 2
    for computation in products:
        operands = [line for line in computation.splitlines() if " parameter(" in line]
        assert len(operands) == 2 and all("= bf16[" in line for line in operands), computation
