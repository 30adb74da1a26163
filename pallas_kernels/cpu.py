"""Products in bfloat16 on a CPU: by our own kernel (`native/matmul.cc`) where it can be had, or by XLA at its full speed.

XLA's CPU backend has a fast kernel (AMX, AVX512-BF16) for one form only: row-major [M, K] times row-major [K, N], summed
in float32. Any transposed operand, and a sum in bfloat16, falls back to converting everything to float32, five times
slower. XLA turns a transposed operand into a layout of the product, so the transpose has to be hidden from it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.native import native
from pallas_kernels.partition import auto_axes

STEP = 32  # inputs that a tile takes at once
NUM_PARTS = 16  # of a transpose: fewer are slower to write


def matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x w in x's dtype, summed in float32, whose gradients too are products of the fast form.

    Elsewhere it is the plain product, which checkpoint policies know by its kind.
    """
    on_cpu = dispatch.current_chip().platform == "cpu"
    return _matmul(x, w) if on_cpu and x.dtype == jnp.bfloat16 else x @ w


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_float32(x: Float[Array, "*batch K"], w: Float[Array, "_ _"], transposed: bool = False):
    """x w in float32 [..., N], as logits are. w is [K, N], or transposed, as a table of embeddings is, [N, K]."""
    rows = x.reshape(-1, x.shape[-1]) if dispatch.current_chip().platform == "cpu" else None
    if rows is not None and _is_ours(rows, w):
        return _ours(rows, w, jnp.float32, transposed).reshape(*x.shape[:-1], -1)
    return _any_product(x, w, transposed)


matmul_float32.defvjp(
    lambda x, w, transposed: (matmul_float32(x, w, transposed), (x, w)),
    lambda transposed, residuals, g: jax.vjp(lambda x, w: _any_product(x, w, transposed), *residuals)[1](g),
)


def _any_product(x, w, transposed):
    contracted = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    return lax.dot_general(x, w, contracted, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _matmul(x, w):
    return _ours(x, w, x.dtype) if _is_ours(x, w) else dot(x, w).astype(x.dtype)


def _is_ours(rows: Array, w: Array) -> bool:
    fits = rows.shape[1] % STEP == 0 and rows.dtype == w.dtype == jnp.bfloat16
    return fits and not auto_axes() and native().tiles


def _ours(rows: Array, w: Array, dtype, transposed: bool = False) -> Array:
    out = jax.ShapeDtypeStruct((len(rows), w.shape[0 if transposed else 1]), dtype)
    return jax.ffi.ffi_call("pallas_kernels.matmul", out, vmap_method="sequential")(rows, w, transposed=transposed)


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
