"""Rotary embeddings against complex numbers in float64: values, gradients, and the TPU's kernel for heads of each size."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, rotary
from pallas_kernels.rotary import tpu


def arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    angles = rng.uniform(0, 100, (*shape[:2], 1, shape[3] // 2))
    return rng.standard_normal(shape), np.cos(angles), np.sin(angles)


def expected(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@functools.partial(jax.jit, static_argnames="implementation")
def both(x, cos, sin, g, implementation):
    out, pull = jax.vjp(lambda x: rotary(x, cos, sin, implementation=implementation), x)
    return out, pull(g)[0]


@pytest.mark.compat
@settings(max_examples=25)
@given(
    shape=st.tuples(
        st.integers(1, 2), st.sampled_from([16, 48]), st.sampled_from([1, 2, 3, 8]), st.sampled_from([32, 64, 128, 256])
    ),
    implementation=st.sampled_from(["xla", "tpu"]),
    seed=st.integers(0, 100),
)
def test_it_turns_pairs_and_its_gradient_turns_them_back(shape, implementation, seed):
    given_arrays = [np.asarray(a, np.float32) for a in (*arrays(shape, seed), arrays(shape, seed + 1)[0])]
    refused = tpu.refuse(dispatch.Chip("tpu", "TPU v6 lite"), {"x": given_arrays[0]})
    if implementation == "tpu" and refused:
        assert shape[2] * shape[3] % 128
        return
    x, cos, sin, g = given_arrays
    out, dx = both(x, cos, sin, g, implementation)
    np.testing.assert_allclose(out, expected(x, cos, sin), atol=1e-5)
    np.testing.assert_allclose(dx, expected(g, cos, -sin), atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_in_bfloat16_only_the_result_is_rounded(implementation):
    x, cos, sin = arrays((1, 64, 2, 128))
    x = jnp.asarray(x, jnp.bfloat16)
    tables = jnp.asarray(cos, jnp.float32), jnp.asarray(sin, jnp.float32)
    got = rotary(x, *tables, implementation=implementation)
    exact = rotary(x.astype(jnp.float32), *tables, implementation="xla")
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "shape, dtype, why",
    [
        ((1, 16, 4, 48), "float32", "heads that fill vectors of 128, not 4 of 48"),
        ((1, 16, 3, 64), "float32", "heads that fill vectors of 128, not 3 of 64"),
        ((1, 5, 2, 64), "float32", "a multiple of 16 tokens, not 5"),
        ((1, 16, 2, 64), "float16", "bfloat16 and float32, not float16"),
    ],
)
def test_what_the_tpu_kernel_does_not_take_it_says(shape, dtype, why):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert re.search(why, tpu.refuse(dispatch.Chip("tpu", "TPU v6 lite"), {"x": x}))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    x, cos, sin = arrays((1, 16, 2, 64))
    with pytest.raises(ValueError, match="rotary takes cos and sin of"):
        rotary(x, cos[:, :8], sin)
    with pytest.raises(ValueError, match="an even H"):
        rotary(x[..., :63], cos, sin)
