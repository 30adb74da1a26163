"""Products on a CPU: by our own kernels where they can be had, or by XLA at its full speed.

In bfloat16 with AMX (`native/matmul.cc`): XLA's CPU backend has a fast kernel (AMX, AVX512-BF16) for one form only,
row-major [M, K] times row-major [K, N], summed in float32. Any transposed operand, and a sum in bfloat16, falls back to
converting everything to float32, five times slower. XLA turns a transposed operand into a layout of the product, so the
transpose has to be hidden from it. Else by vector registers, which take any form: `native/vector_matmul.cc`, and
`native/few_rows_matmul.cc` where there is too little to do to pay for packing the weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.native import native
from pallas_kernels.partition import auto_axes, varying_axes

STEP = 32  # inputs that a tile takes at once
NUM_PARTS = 16  # of a transpose: fewer are slower to write
SMALLEST = 32  # rows and outputs that are worth packing both sides
FULL_REGISTERS = 16  # inputs, of either width of registers
NAME = "product"
TILES, VECTORS = "pallas_kernels.matmul", "pallas_kernels.vector_matmul"
FEW_ROWS = "pallas_kernels.few_rows_matmul"


def matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """x w in x's dtype, summed in float32, whose gradients too are products of a fast form.

    Elsewhere it is the plain product, which checkpoint policies know by its kind; here they know it as `NAME`.
    """
    on_cpu = dispatch.current_chip().platform == "cpu"
    return checkpoint_name(_matmul(x, w), NAME) if on_cpu and x.dtype in (jnp.bfloat16, jnp.float32) else x @ w


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_float32(x: Float[Array, "*batch K"], w: Float[Array, "_ _"], transposed: bool = False):
    """x w in float32 [..., N], as logits are. w is [K, N], or transposed, as a table of embeddings is, [N, K]."""
    rows = x.reshape(-1, x.shape[-1]) if dispatch.current_chip().platform == "cpu" else None
    if rows is not None and _by_tiles(rows, w):
        return _tiles(rows, w, jnp.float32, transposed).reshape(*x.shape[:-1], -1)
    if rows is not None and _by_vectors(rows, w):
        return product(rows, w, b_transposed=transposed).reshape(*x.shape[:-1], -1)
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
    return _tiles(x, w, x.dtype) if _by_tiles(x, w) else product(x, w).astype(x.dtype)


def _backward(residuals, g):
    x, w = residuals
    return product(g, w, b_transposed=True).astype(x.dtype), product(x, g, a_transposed=True).astype(w.dtype)


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _backward)


def product(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], *, a_transposed: bool = False, b_transposed: bool = False
) -> Float[Array, "M N"]:
    """a [M, K] b [K, N] in float32; each may lie transposed."""
    (rows, inputs), outputs = a.shape[:: -1 if a_transposed else 1], b.shape[int(not b_transposed)]
    out = jax.ShapeDtypeStruct((rows, outputs), jnp.float32)
    if _by_vectors(a, b) and outputs >= SMALLEST:
        if rows >= SMALLEST:
            call = jax.ffi.ffi_call(VECTORS, out, vmap_method="sequential")
            return call(a, b, a_transposed=a_transposed, b_transposed=b_transposed)
        if not a_transposed and not (b_transposed and inputs % FULL_REGISTERS):
            return jax.ffi.ffi_call(FEW_ROWS, out, vmap_method="sequential")(a, b, w_transposed=b_transposed)
    a, b = transpose(a) if a_transposed else a, transpose(b) if b_transposed else b
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def refuse_natively(arguments: Any) -> str | None:
    """Why no call of ours takes these arguments, whatever they are for; None where one can."""
    if axes := varying_axes(arguments):
        return (
            f"does not say that its results vary over {', '.join(axes)}: call it inside shard_map with check_vma=False"
        )
    return native().missing or None


def _by_vectors(a: Array, b: Array) -> bool:
    if dispatch.current_chip().platform != "cpu" or a.dtype != b.dtype:
        return False
    if auto_axes() or varying_axes((a, b)):
        return False
    found = native()
    return not found.missing and (a.dtype == jnp.float32 or (a.dtype == jnp.bfloat16 and not found.tiles))


def _by_tiles(rows: Array, w: Array) -> bool:
    fits = rows.shape[1] % STEP == 0 and rows.dtype == w.dtype == jnp.bfloat16
    return fits and not auto_axes() and native().tiles


def _tiles(rows: Array, w: Array, dtype, transposed: bool = False) -> Array:
    out = jax.ShapeDtypeStruct((len(rows), w.shape[0 if transposed else 1]), dtype)
    return jax.ffi.ffi_call(TILES, out, vmap_method="sequential")(rows, w, transposed=transposed)


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
