"""Products with int8 weights on the host's processor, by AMX tiles where it has them and for W8A8, else by vectors.

`native/matmul.cc` and `native/vector_quantized_matmul.cc`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cpu import refuse_natively
from pallas_kernels.dispatch import Arguments, Chip
from pallas_kernels.native import native
from pallas_kernels.quantized_matmul.reference import finish
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor

STEP = 64  # codes of a row that a tile takes at once, and a whole number of registers
MOST_ROWS = 48  # of x as it is: more are faster with the weights widened once


def quantized_matmul(
    x: Array, w: QuantizedTensor, bias: Array | None, *, activations: str | None, activation: str | None, out_dtype: Any
) -> Array:
    """See `api.quantized_matmul`; x is [M, K]."""
    plain = bias is None and activation is None and out_dtype in (jnp.float32, jnp.bfloat16)
    out = jax.ShapeDtypeStruct((len(x), w.data.shape[0]), out_dtype if plain else jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, w.padded_size - w.size)))
    codes = activations == "int8"
    target, how = (
        ("quantized_matmul", {}) if codes and native().tiles else ("vector_quantized_matmul", {"codes": codes})
    )
    call = jax.ffi.ffi_call(f"pallas_kernels.{target}", out, vmap_method="sequential")
    return finish(call(x, w.data, w.scales[0], **how), bias, activation, out_dtype)


def refuse(chip: Chip, arguments: Arguments) -> str | None:
    x, w, activations = arguments["x"], arguments["w"], arguments["activations"]
    if activations not in (None, "int8") or w.bits != 8:
        return "takes weights of int8, and activations as they are or in int8"
    if w.axis != -1 or w.zeros is not None or w.scales.shape[0] != 1:
        return "takes weights [N, K] with one scale an output and no zero points"
    if w.padded_size % STEP:
        return f"takes inputs in steps of {STEP}, which {w.padded_size} is not a multiple of"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {x.dtype}"
    if activations is None and len(x) > MOST_ROWS:
        return f"takes at most {MOST_ROWS} rows that are not quantised, not {len(x)}"
    return refuse_natively(arguments)
