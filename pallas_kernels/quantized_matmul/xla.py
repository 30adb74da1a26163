"""The product with quantised weights in plain XLA, for any platform and fast on a CPU.

Elsewhere weights are dequantised on the way into the product, which the compiler fuses. On a CPU it does not, and to
write the weights out costs more than the product. But its int8 product reads them as they are, so for a few rows x is
split into three int8 digits, x = m / 127 (d0 + d1 / 254 + d2 / 254**2) with m its row's largest entry: that is 22 bits
below m, a float32 sum's precision, and the integer sums are exact. Three rows cost no more than one.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cpu import transpose
from pallas_kernels.quantized_matmul.reference import finish
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, dequantize, halves, quantize_rows

NUM_DIGITS = 3
BASE = 254.0
SUBLANES = 8  # a CPU's int8 and bf16 products of fewer rows are slow
# Most rows that are split into digits, by whether there is one group: the sums of more do not stay in the cache from
# one group to the next.
MOST_ROWS = {True: 64, False: 16}


def quantized_matmul(
    x: Array, w: QuantizedTensor, bias: Array | None, *, activations: str | None, activation: str | None, out_dtype: Any
) -> Array:
    """See `api.quantized_matmul`; x is [M, K]."""
    if activations == "int8":
        codes, scales = quantize_rows(x, "int8")
        out = _integer_product(codes, w) * scales
    elif activations == "fp8":
        codes, scales = quantize_rows(x, "fp8")
        out = lax.platform_dependent(codes, w, cpu=_fp8_widened, default=_fp8_product) * scales
    elif w.bits == "fp8" or x.dtype == jnp.float64 or len(x) > MOST_ROWS[w.group_size is None]:
        out = _dequantized_product(x, w)
    else:
        out = lax.platform_dependent(x, w, cpu=_product_of_digits, default=_dequantized_product)
    return finish(out, bias, activation, out_dtype)


def input_gradient(g: Array, w: QuantizedTensor, dtype: Any) -> Array:
    """g w^T of g [M, N]."""
    weights = dequantize(w, g.dtype)
    weights = transpose(weights) if w.axis == -2 else weights
    return _contract(_rows(g), weights, -2, _sums(g))[: len(g)].astype(dtype)


def _dequantized_product(x: Array, w: QuantizedTensor) -> Array:
    """Weights are rounded to x's dtype; with one group the scales wait until after the sum, and nothing is rounded."""
    late = w.group_size is None and w.zeros is None
    weights = dequantize(dataclasses.replace(w, scales=jnp.ones_like(w.scales)) if late else w, x.dtype)
    out = _contract(_rows(x), weights, w.axis, _sums(x))[: len(x)]
    return out * w.scales.astype(out.dtype) if late else out


def _product_of_digits(x: Array, w: QuantizedTensor) -> Array:
    values = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(values), axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    rest = values / largest * 127
    digits = []
    for _ in range(NUM_DIGITS):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * BASE
    parts = _integer_product(jnp.concatenate(digits), w).reshape(NUM_DIGITS, len(x), -1)
    out = parts[0] + parts[1] / BASE + parts[2] / BASE**2
    return out * (largest / 127)


def _integer_product(codes: Array, w: QuantizedTensor) -> Array:
    """Sum over groups of scale (codes w - zero sum(codes)) of int8 codes [M, K]: exact in a group, float32 over them.

    Groups are taken one by one: a batched product of int8 is slow on a CPU, and slices of the weights are no copies.
    """
    num_rows, num_groups = len(codes), w.scales.shape[0]
    codes = jnp.pad(_rows(codes), ((0, 0), (0, w.padded_size - w.size)))
    size = codes.shape[1] // num_groups
    out: Array | float = 0.0
    for group in range(num_groups):
        part = codes[:, group * size : (group + 1) * size]
        total = _int4_or_int8(part, w, group).astype(jnp.float32)
        if w.zeros is not None:
            sums = jnp.sum(part, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
            total = total - sums * w.zeros[group].astype(jnp.float32)
        out = out + total * w.scales[group]
    return out[:num_rows]  # type: ignore[index]


def _int4_or_int8(codes: Array, w: QuantizedTensor, group: int) -> Array:
    size = codes.shape[1] // (2 if w.bits == 4 else 1)
    data = lax.slice_in_dim(w.data, group * size, (group + 1) * size, axis=w.data.ndim + w.axis)
    product = functools.partial(_contract, axis=w.axis, dtype=jnp.int32)
    if w.bits != 4:
        return product(codes, data)
    first, second = halves(data)
    return product(codes[:, 0::2], first) + product(codes[:, 1::2], second)


def _fp8_product(codes: Array, w: QuantizedTensor) -> Array:
    num_groups = w.scales.shape[0]
    codes = jnp.pad(codes, ((0, 0), (0, w.padded_size - w.size)))
    size = codes.shape[1] // num_groups
    out: Array | float = 0.0
    for group in range(num_groups):
        data = lax.slice_in_dim(w.data, group * size, (group + 1) * size, axis=w.data.ndim + w.axis)
        part = codes[:, group * size : (group + 1) * size]
        out = out + _contract(part, data, w.axis, jnp.float32) * w.scales[group]
    return out  # type: ignore[return-value]


def _fp8_widened(codes: Array, w: QuantizedTensor) -> Array:
    """A CPU has no fp8: float32 holds the codes and bfloat16 products of them, exactly."""
    return _dequantized_product(codes.astype(jnp.float32), w)


def _contract(a: Array, b: Array, axis: int, dtype: Any) -> Array:
    return lax.dot_general(a, b, (((1,), (b.ndim + axis,)), ((), ())), preferred_element_type=dtype)


def _rows(x: Array) -> Array:
    return jnp.pad(x, ((0, -len(x) % SUBLANES), (0, 0)))


def _sums(x: Array) -> Any:
    return jnp.promote_types(jnp.float32, x.dtype)
