"""The definition of the product with quantised weights, as plain as it can be written; the truth in tests."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, dequantize, quantize_rows

ACTIVATIONS = {
    None: lambda x: x,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def quantized_matmul(
    x: Array,
    w: QuantizedTensor,
    bias: Array | None,
    *,
    activations: str | None,
    activation: str | None,
    out_dtype: Any,
) -> Array:
    """activation(x dequantize(w) + bias) of x [M, K], in float32 or, where x is, in float64."""
    precision = jnp.promote_types(jnp.float32, x.dtype)
    if activations is not None:
        codes, scales = quantize_rows(x, "int8" if activations == "int8" else "fp8")
        x = codes.astype(precision) * scales.astype(precision)
    weights = dequantize(w, precision)
    weights = weights if w.axis == -2 else weights.T
    return finish(jnp.dot(x.astype(precision), weights, precision="highest"), bias, activation, out_dtype)


def input_gradient(g: Array, w: QuantizedTensor, dtype: Any) -> Array:
    """g dequantize(w)^T of g [M, N]: what the gradient of the output gives that of x."""
    precision = jnp.promote_types(jnp.float32, g.dtype)
    weights = dequantize(w, precision)
    weights = weights.T if w.axis == -2 else weights
    return jnp.dot(g.astype(precision), weights, precision="highest").astype(dtype)


def finish(out: Array, bias: Array | None, activation: str | None, dtype: Any) -> Array:
    """activation(out + bias), in out's precision, as `dtype`."""
    if bias is not None:
        out = out + bias.astype(out.dtype)
    return ACTIVATIONS[activation](out).astype(dtype)
