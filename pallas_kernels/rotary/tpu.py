"""Rotary position embeddings on a TPU: one pass over heads that lie side by side.

A product leaves its outputs [tokens, N * H] and the attention kernel takes them so, while XLA sees [tokens, N, H] in
between, which is no other view of the same memory unless tokens are innermost. So it lays out queries with tokens
innermost, then the stream that they come from, and copies all of it before and after the kernels: 8 copies of the
stream's size a layer of a Llama training step, a twelfth of it on v6e by the compiler's cycles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

INTERPRET: bool = True  # a kernel, where there is no TPU
LANES, ALIGNMENT = 128, 16  # of a vector register; rows of a tile of bfloat16
DTYPES = (jnp.bfloat16, jnp.float32)
BLOCK_BYTES = 2**22  # of a block of rows, of which four are held
CHUNK = 32  # rows whose float32 values are in registers at a time
FEWEST = 512  # tokens whose copies take longer than a kernel's start


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    x = arguments["x"]
    batch, length, heads, size = x.shape
    if x.dtype not in DTYPES:
        return f"takes bfloat16 and float32, not {x.dtype}"
    if heads * size % LANES or (size % LANES and LANES % size):
        return f"takes heads that fill vectors of {LANES}, not {heads} of {size}"
    if batch * length % ALIGNMENT:
        return f"takes a multiple of {ALIGNMENT} tokens, not {batch * length}"
    if batch * length < FEWEST and not dispatch.interpreted():
        return f"takes at least {FEWEST} tokens, not {batch * length}"
    return None


@jax.custom_vjp
def rotary(x, cos, sin):
    """See `api.rotary`."""
    return _turn(x, cos, sin)


# A rotation's transpose is the rotation back.
rotary.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)), lambda kept, g: (_turn(g, kept[0], -kept[1]), None, None)
)


def _turn(x, cos, sin):
    batch, length, heads, size = x.shape
    rows, columns = batch * length, heads * size
    # What a number is multiplied by, and what its partner is, [rows, lanes of whole heads].
    repeats = max(1, LANES // size)
    by = [jnp.concatenate([a, b] * repeats, axis=-1).reshape(rows, -1) for a, b in ((cos, cos), (-sin, sin))]
    height = next(
        h for h in (512, 256, 128, 64, 32, 16) if rows % h == 0 and (h == 16 or h * columns * 4 <= BLOCK_BYTES)
    )
    block = pl.BlockSpec((height, columns), lambda i: (i, 0))
    table = pl.BlockSpec((height, size * repeats), lambda i: (i, 0))
    turned = pl.pallas_call(
        functools.partial(_kernel, size),
        grid=(rows // height,),
        in_specs=[block, table, table],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=2 * x.size * x.dtype.itemsize + 8 * rows * size * repeats, transcendentals=0
        ),
        interpret=INTERPRET if dispatch.interpreted() else False,
        name="rotary",
    )(x.reshape(rows, columns), *by)
    return turned.reshape(x.shape)


def _kernel(size: int, x, cos, sin, out):
    width = cos.shape[1]

    def chunk(i, _):
        here = pl.ds(pl.multiple_of(i * step, step), step)
        for at in range(0, x.shape[1], width):
            a = x[here, at : at + width].astype(jnp.float32)
            out[here, at : at + width] = (a * cos[here] + _partner(a, size) * sin[here]).astype(out.dtype)

    step = min(CHUNK, x.shape[0])
    lax.fori_loop(0, x.shape[0] // step, chunk, None)


def _partner(a, size: int):
    """Of every number, the other one of its pair."""
    width, half = a.shape[1], size // 2
    before = pltpu.roll(a, half, 1)  # for circular shifts by half of all there is, both ways are one
    if width == size:
        return before
    after = pltpu.roll(a, width - half, 1)
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 1) % size < half, after, before)
