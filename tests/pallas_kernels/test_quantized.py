"""Quantised weights and their products, against float64 numpy: packing, error bounds, every implementation, gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.quantized_matmul import gpu, tensor, tpu
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.tensor import dequantize, quantize


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


class Case(NamedTuple):
    rows: int = 3
    inputs: int = 200
    outputs: int = 150
    bits: Any = 8
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    dtype: str = "float32"
    bias: bool = False
    activation: str | None = None
    axis: int = -2

    def arrays(self):
        """x, w, bias and the output's cotangent."""
        x = normal(self.rows, self.inputs)
        w = normal(self.inputs, self.outputs, seed=1) + 0.3
        b, g = normal(self.outputs, seed=2), normal(self.rows, self.outputs, seed=3)
        x, w, b, g = (jnp.asarray(a, jnp.float32) for a in (x, w, b, g))
        q = _quantize(w if self.axis == -2 else w.T, self.bits, self.group_size, self.symmetric, self.axis)
        return x.astype(self.dtype), q, b if self.bias else None, g


_quantize = jax.jit(quantize, static_argnums=(1, 2, 3, 4))


def weights(q) -> np.ndarray:
    """The weights [..., K, N] that q stands for in float64, read code by code as its documentation says."""
    data = np.asarray(q.data) if q.axis == -2 else np.asarray(q.data.mT)
    if q.bits == 4:
        codes = np.stack([data & 15, data >> 4], axis=-2).reshape(*data.shape[:-2], -1, data.shape[-1]).astype(int)
        codes = np.where(codes > 7, codes - 16, codes)
    else:
        codes = data.astype(np.float64)
    of = np.arange(codes.shape[-2]) // (codes.shape[-2] // q.scales.shape[-2])
    zeros = 0 if q.zeros is None else np.asarray(q.zeros, np.float64)[..., of, :]
    return ((codes - zeros) * np.asarray(q.scales, np.float64)[..., of, :])[..., : q.size, :]


ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + np.exp(-z) * (1 + z)) / (1 + np.exp(-z)) ** 2),
}


def expected(case: Case, x, q, bias, g):
    """(out, dx, d_bias) in float64."""
    x, w, g = np.asarray(x, np.float64), weights(q), np.asarray(g, np.float64)
    if case.activations == "int8":
        scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
        x = np.round(np.float32(x) / scale) * np.float64(scale)
    elif case.activations == "fp8":
        scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(448)
        x = np.asarray(jnp.asarray(np.float32(x) / scale).astype(tensor.FP8), np.float64) * np.float64(scale)
    function, slope = ACTIVATIONS[case.activation]
    before = x @ w + (0 if bias is None else np.asarray(bias, np.float64))
    d_before = g * slope(before)
    return function(before), d_before @ w.T, d_before.sum(axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(case: Case, implementation, x, q, bias, g):
    def product(x, bias):
        return quantized_matmul(
            x,
            q,
            bias=bias,
            activations=case.activations,
            activation=case.activation,
            out_dtype=jnp.float32,
            implementation=implementation,
        )

    out, pull = jax.vjp(product, x, bias)
    return out, *pull(g)


def check(case: Case, implementation) -> None:
    arrays = case.arrays()
    for found, true in zip(run(case, implementation, *arrays), expected(case, *arrays), strict=True):
        if found is not None:
            tolerance = 2e-6 if found.dtype == jnp.float32 else 2e-2
            rounded = case.dtype == "bfloat16"  # weights or cotangents are, somewhere
            error = np.abs(np.asarray(found, np.float64) - true).max() / np.abs(true).max()
            assert error < (2e-2 if rounded else 4 * tolerance), (case, implementation, error)


CASES = [
    Case(),
    Case(bits=4, group_size=64, symmetric=False, bias=True, activation="silu"),
    Case(rows=20, bits=4, group_size=None, dtype="bfloat16"),
    Case(inputs=400, bits=8, group_size=128, symmetric=False, activations="int8", bias=True),
    Case(inputs=400, bits=4, group_size=128, symmetric=False, activations="int8", activation="relu"),
    Case(bits="fp8", group_size=128, activations="fp8"),
    Case(bits="fp8", bias=True),
    Case(rows=70, bits=8, group_size=64, symmetric=False),
    Case(rows=21, bits=4, group_size=64),
    Case(rows=270, inputs=256, bits=4, group_size=64, symmetric=False),
]
TRANSPOSED = [
    Case(bits=8, axis=-1, bias=True),
    Case(bits=4, group_size=32, symmetric=False, axis=-1),
    Case(bits=4, group_size=64, activations="int8", axis=-1),
    Case(bits="fp8", activations="fp8", axis=-1),
]


@pytest.mark.compat
@pytest.mark.parametrize("case", CASES[:5])
@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_product_and_gradients(case, implementation):
    check(case, implementation)


@pytest.mark.parametrize("case", CASES[5:])
@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_fp8_and_many_rows(case, implementation):
    check(case, implementation)


@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_weights_quantised_along_their_last_axis(case, implementation):
    check(case, implementation)


ON_A_GPU = [
    Case(rows=3, inputs=512, outputs=152, axis=-1, dtype="bfloat16", bias=True, activation="silu"),
    Case(rows=16, inputs=1000, outputs=256, axis=-1, dtype="bfloat16"),
    Case(rows=200, inputs=512, outputs=320, bits=8, group_size=128, symmetric=False, axis=-1, dtype="bfloat16"),
    Case(rows=1, inputs=512, outputs=136, bits=4, group_size=128, axis=-1, dtype="bfloat16"),
    Case(rows=20, inputs=1024, outputs=256, bits=4, group_size=256, symmetric=False, axis=-1, dtype="bfloat16"),
    Case(rows=8, inputs=2048, outputs=512, bits=4, axis=-1, dtype="bfloat16"),
    Case(rows=5, inputs=640, outputs=200, activations="int8", axis=-1, dtype="bfloat16"),
    Case(rows=40, inputs=512, outputs=128, group_size=128, activations="int8", axis=-1, dtype="bfloat16"),
    Case(rows=9, inputs=512, outputs=128, bits="fp8", activations="fp8", axis=-1, dtype="bfloat16"),
    Case(rows=33, inputs=512, outputs=128, bits="fp8", axis=-1, dtype="bfloat16"),
]


@given(tiles=st.integers(1, 40), steps=st.integers(1, 30), programs=st.integers(1, 50))
def test_every_step_on_a_gpu_belongs_to_one_part_of_its_tile(tiles, steps, programs):
    """The kernel's shares, walked in Python: parts are numbered without a gap, and there are as many as are summed."""
    total = tiles * steps
    programs = min(programs, total)
    found: dict[int, list[int]] = {tile: [] for tile in range(tiles)}
    for program in range(programs):
        first, end = program * total // programs, (program + 1) * total // programs
        for step in range(first, end):
            tile = step // steps
            if step % steps == steps - 1 or step == end - 1:
                found[tile].append(program - ((tile * steps + 1) * programs - 1) // total)
    assert [found[tile] for tile in found] == [list(range(n)) for n in gpu._parts(tiles, steps, programs)]


@given(rows=st.integers(1, 600), inputs=st.integers(1, 60), outputs=st.integers(1, 4000), bits=st.sampled_from([4, 8]))
def test_warpgroups_on_a_gpu_ask_for_no_more_registers_than_they_start_with(rows, inputs, outputs, bits):
    """They would wait for them forever; the pipeline divides 512 a thread of a warpgroup, less 40 for the copying one."""
    found = gpu.candidates(rows, inputs * 256, outputs, 128, bits, 2)
    assert found
    for block in found:
        computing = block.n // gpu.WARPGROUP_ROWS
        start = min(255, 65536 // (128 * (computing + 1))) // 8 * 8
        wanted = min(256, (512 - 40) // computing) // 8 * 8
        assert computing * wanted + 40 <= start * (computing + 1) or computing == 1
        assert block.m * block.n * 4 + block.stages * block.k * (block.n * bits // 8 + block.m * 2) < gpu.SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU, ids=range(len(ON_A_GPU)))
def test_the_gpu_kernel_on_a_gpu(case):
    check(case, "gpu")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        rows=st.sampled_from([1, 9, 17]),
        inputs=st.sampled_from([70, 256]),
        outputs=st.sampled_from([40, 130]),
        bits=st.sampled_from([8, 4]),
        group_size=st.sampled_from([None, 64, 128]),
        symmetric=st.booleans(),
        activations=st.sampled_from([None, "int8"]),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        bias=st.booleans(),
        activation=st.sampled_from([None, "silu", "relu"]),
        axis=st.just(-2),
    ),
    st.sampled_from(["xla", "tpu"]),
)
def test_any_product(case, implementation):
    check(case, implementation)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]])
def test_many_blocks(case, monkeypatch):
    """Several steps along every dimension of the grid, the last ones partly outside."""
    monkeypatch.setattr(tpu, "candidates", lambda *_: [tpu.Blocks(16, 128, 128)])
    check(case._replace(rows=20, inputs=300, outputs=200), "tpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_kernel_has_no_races_and_reads_nothing_unwritten(bits, monkeypatch):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    monkeypatch.setattr(tpu, "candidates", lambda *_: [tpu.Blocks(16, 128, 128)])
    monkeypatch.setattr(tpu, "_interpret", lambda: params)
    check(Case(rows=5, inputs=256, outputs=140, bits=bits, group_size=128, symmetric=False, bias=True), "tpu")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([((), 2, 7), ((2,), 30, 7)]),
    st.sampled_from([-2, -1]),
    st.integers(0, 2**32 - 1),
)
def test_packing_loses_nothing(shape, axis, seed):
    batch, size, other = shape
    shape = (*batch, size, other) if axis == -2 else (*batch, other, size)
    codes = np.random.default_rng(seed).integers(-8, 8, shape).astype(np.int8)
    packed = tensor.pack(jnp.asarray(codes), axis)
    assert packed.dtype == jnp.uint8 and packed.shape[axis] == size // 2
    np.testing.assert_array_equal(tensor.unpack(packed, axis), codes)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from([8, 4, "fp8"]),
    st.sampled_from([None, 2, 96]),
    st.booleans(),
    st.sampled_from([-2, -1]),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.integers(0, 2**32 - 1),
)
def test_no_weight_is_off_by_more_than_half_a_step(bits, group_size, symmetric, axis, magnitude, seed):
    symmetric = symmetric or bits == "fp8"
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((2, 130, 6)) * magnitude + rng.choice([0, 3]) * magnitude).astype(np.float32)
    w[:, :4] = rng.choice([0, magnitude])
    q = _quantize(jnp.asarray(w if axis == -2 else w.swapaxes(1, 2)), bits, group_size, symmetric, axis)
    assert q.shape == (w.shape if axis == -2 else w.swapaxes(1, 2).shape)
    of = np.arange(130) // (group_size or 1000)
    step = np.asarray(q.scales)[:, of]
    bound = np.maximum(np.abs(w) / 16, step / 1024) if bits == "fp8" else step / 2
    assert np.all(np.abs(weights(q) - w) <= bound * (1 + 1e-4))
    values = np.asarray(dequantize(q), np.float64)
    np.testing.assert_allclose(values if axis == -2 else values.swapaxes(1, 2), weights(q), rtol=1e-6, atol=0)


@pytest.mark.compat
def test_transposing_keeps_the_weights():
    q = _quantize(jnp.asarray(normal(2, 70, 6), jnp.float32), 4, 32, False, -2)
    assert q.mT.shape == (2, 6, 70) and q.mT.axis == -1 and q.mT.mT.data.shape == q.data.shape
    np.testing.assert_array_equal(dequantize(q.mT), dequantize(q).mT)


def test_stacked_layers_are_scanned_over():
    layers = _quantize(jnp.asarray(normal(3, 64, 64), jnp.float32), 4, 32, True, -2)
    x = jnp.asarray(normal(2, 64, seed=1), jnp.float32)
    out, _ = jax.lax.scan(lambda x, w: (quantized_matmul(x, w) / 8, None), x, layers)
    np.testing.assert_allclose(out, functools.reduce(lambda x, w: x @ w / 8, weights(layers), np.asarray(x)), rtol=1e-4)


def test_leading_dimensions_of_x_and_its_dtype_are_kept():
    q = _quantize(jnp.ones((64, 32)), 8, None, True, -2)
    out = quantized_matmul(jnp.ones((2, 3, 64), jnp.bfloat16), q)
    assert out.shape == (2, 3, 32) and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 64)


def test_float64_stays_float64_in_the_reference():
    with jax.enable_x64(True):
        case = Case(bits=4, group_size=32, symmetric=False)
        x, q, bias, g = case.arrays()
        out = quantized_matmul(x.astype(jnp.float64), q, implementation="reference")
        np.testing.assert_allclose(out, expected(case, x, q, bias, g)[0], rtol=1e-12, atol=1e-10)


def test_digits_are_as_exact_as_a_float32_sum():
    """Rows with one entry a thousand times the others, as language models have them."""
    case = Case(rows=4, inputs=512, outputs=64)
    x, q, bias, g = case.arrays()
    x = x.at[:, 3].mul(1000.0)
    error = np.abs(np.asarray(quantized_matmul(x, q, implementation="xla")) - expected(case, x, q, bias, g)[0])
    size = np.abs(np.asarray(x)).max(axis=1, keepdims=True) * np.sqrt(np.square(weights(q)).sum(axis=0))
    assert np.max(error / size) < 2e-7


def test_explain_names_the_reasons():
    x, q, *_ = Case(bits=4, group_size=32).arrays()
    choice = dispatch.explain(quantized_matmul, x, q)
    assert choice.name == "xla" and "written for a tpu" in choice.passed_over["tpu"]
    with pytest.raises(ValueError, match="group_size=32 is not a multiple of 64"):
        quantized_matmul(x, q, implementation="tpu")
    with pytest.raises(ValueError, match=r"use w\.mT"):
        quantized_matmul(x, q.mT, implementation="tpu")


W = quantize(jnp.ones((64, 32)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantized_matmul(jnp.ones((2, 63)), W), "does not end in the 64 inputs"),
        (lambda: quantized_matmul(jnp.ones((2, 64)), W, bias=jnp.ones(31)), r"bias \(31,\) is not \(32,\)"),
        (lambda: quantized_matmul(jnp.ones((2, 64)), W, activations="fp8"), "do not go with weights of bits=8"),
        (lambda: quantized_matmul(jnp.ones((2, 64)), W, activation="tanh"), "activation='tanh'"),
        (lambda: quantized_matmul(jnp.ones((2, 64)), quantize(jnp.ones((2, 64, 4)))), "two dimensions"),
        (lambda: quantize(jnp.ones((4, 4)), bits=3), "bits=3 is not"),
        (lambda: quantize(jnp.ones((4, 4)), group_size=3), "group_size=3 is not an even number"),
        (lambda: quantize(jnp.ones((4, 4, 4)), axis=0), "one of its last two axes"),
        (lambda: quantize(jnp.ones((4, 4)), bits="fp8", symmetric=False), "no zero points"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
