"""Products in bfloat16 that XLA's CPU backend computes at full speed.

It has a fast kernel (AMX, AVX512-BF16) for one form only: row-major [M, K] times row-major [K, N], summed in float32.
Any transposed operand, and a sum in bfloat16, falls back to converting everything to float32, five times slower. XLA
turns a transposed operand into a layout of the product, so the transpose has to be hidden from it.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import dispatch

NUM_PARTS = 16  # of a transpose: fewer are slower to write


def matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x w in x's dtype, summed in float32, whose gradients too are products of the fast form.

    Elsewhere it is the plain product, which checkpoint policies know by its kind.
    """
    on_cpu = dispatch.current_chip().platform == "cpu"
    return _matmul(x, w) if on_cpu and x.dtype == jnp.bfloat16 else x @ w


@jax.custom_vjp
def _matmul(x, w):
    return dot(x, w).astype(x.dtype)


def _backward(residuals, g):
    x, w = residuals
    return dot(g, transpose(w)).astype(x.dtype), dot(transpose(x), g).astype(w.dtype)


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _backward)


def dot(a: Float[Array, "M K"], b: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a b in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def transpose(x: Float[Array, "*batch M N"]) -> Float[Array, "*batch N M"]:
    """The last two dimensions swapped; on a CPU a bfloat16 one is written out, which XLA does not undo."""
    if x.dtype != jnp.bfloat16:
        return x.mT
    return lax.platform_dependent(x, cpu=_written_out, default=jnp.matrix_transpose)


def _written_out(x):
    bits = lax.bitcast_convert_type(x, jnp.uint16)  # it would convert floats to float32 on the way
    size = -(-x.shape[-2] // NUM_PARTS)
    ends = [(at, min(at + size, x.shape[-2])) for at in range(0, x.shape[-2], size)]
    parts = [lax.slice_in_dim(bits, start, end, axis=-2).mT for start, end in ends]
    return lax.bitcast_convert_type(jnp.concatenate(parts, axis=-1), x.dtype)
