"""The grouped product on a TPU: tiles of rows against the groups they meet, and no other pair.

A tile that a group boundary crosses is visited once for each group in it, but only the chunks of rows that belong to
the group are multiplied; a chunk begins where the group begins. A long chunk hides how long the matrix units take to
fill and to drain, so the body is compiled for several sizes and the rest of a group takes the smallest that holds it.
The contraction is never split, so that sums stay in the matrix unit's accumulators and a row block is stored once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from pallas_kernels.ragged_dot import gradient
from pallas_kernels.ragged_dot.tiles import Visits, visits

INTERPRET: Any = True  # how a kernel is interpreted where there is no TPU
DTYPES = (jnp.bfloat16, jnp.float32)
BODIES = 4  # sizes that a body is compiled for: quarters of a chunk
BODY_COST = 24  # rows that could be multiplied while the matrix units fill and drain
ALIGNMENT = 16  # rows: a tile of bfloat16 in VMEM; chunks begin at a multiple
VMEM_UNKNOWN = 64 * 2**20  # of an interpreted chip
VMEM_SHARE = 0.75  # of it for blocks; the rest is the compiler's


class RowBlocks(NamedTuple):
    """Of the product of rows: rows loaded, most rows multiplied at a time, columns of the result."""

    tile: int
    chunk: int
    columns: int


class WeightBlocks(NamedTuple):
    """Of the product that sums over rows: rows loaded, most rows summed at a time, and the result's block."""

    tile: int
    chunk: int
    features: int
    columns: int


def ragged_dot(x, w, group_sizes):
    """See `api.ragged_dot`."""
    return gradient.ragged_dot(PRODUCTS, x, w, group_sizes)


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    x, w = arguments["x"], arguments["w"]
    codes = w.data if isinstance(w, QuantizedTensor) else w
    if x.dtype not in DTYPES:
        return f"multiplies bfloat16 and float32, not {x.dtype}"
    if codes is w and w.dtype != x.dtype:
        return f"takes weights of x's {x.dtype}, or quantised ones, not {w.dtype}"
    for inner, outer in (codes.shape[1:], codes.shape[:0:-1]):
        if not row_candidates(x.shape[0], inner, outer, codes.shape[0], x.dtype, codes.dtype):
            return f"has no blocks for K={w.shape[1]}, N={w.shape[2]} that fit the chip's VMEM"
    return None


# Rows times the matrix of their group, [M, K] -> [M, N]; transposed, [M, N] -> [M, K] by the same matrices.


def rows(x, w, scale, sizes, transposed):
    """See `gradient.Products`."""
    num_rows, inner = x.shape
    columns = w.shape[1 if transposed else 2]
    candidates = row_candidates(num_rows, inner, columns, w.shape[0], x.dtype, w.dtype)
    key = {"K": inner, "N": columns, "E": w.shape[0], "M": num_rows, "dtype": x.dtype.name, "w": w.dtype.name}
    block = blocks.pick("ragged_dot.transposed" if transposed else "ragged_dot.forward", key, candidates)
    return _rows(block, transposed, x, w, scale, sizes)


def _rows(block: RowBlocks, transposed: bool, x, w, scale, sizes):
    num_rows, inner = x.shape
    columns = w.shape[1 if transposed else 2]
    tables, count = visits(sizes, num_rows, block.tile)
    num_groups = w.shape[0]

    def at_x(column, i, t: Visits):
        return t.x_tile[i], 0

    def at_w(column, i, t: Visits):
        return (t.w_group[i], column, 0) if transposed else (t.w_group[i], 0, column)

    def at_scale(column, i, t: Visits):
        return t.w_group[i], 0, 0 if transposed else column

    def at_out(column, i, t: Visits):
        return t.tile[i], column

    w_block = (block.columns, inner) if transposed else (inner, block.columns)
    specs = [pl.BlockSpec((block.tile, inner), at_x), pl.BlockSpec((None, *w_block), at_w)]
    scratch = []
    if scale is not None:
        specs.append(pl.BlockSpec((None, scale.shape[1], w_block[1]), at_scale))
        scratch.append(pltpu.VMEM(w_block, x.dtype))
    run = 0 if scale is None else w.shape[1] // scale.shape[1]
    kernel = functools.partial(_rows_kernel, block, num_groups, transposed, run)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(columns, block.columns), count),
            in_specs=specs,
            out_specs=pl.BlockSpec((block.tile, block.columns), at_out),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_vmem_limit()
        ),
        cost_estimate=_cost(num_rows, inner, columns, x, w),
        interpret=INTERPRET if dispatch.interpreted() else False,
        name="ragged_dot_transposed" if transposed else "ragged_dot",
    )(tables, x, w, *([] if scale is None else [scale]))


def _rows_kernel(block: RowBlocks, num_groups: int, transposed: bool, run: int, t: Visits, x, w, *refs):
    i = pl.program_id(1)
    low, high = t.low[i], t.high[i]
    first_column = pl.program_id(0) * block.columns
    scale, out, wide = refs if run else (None, refs[0], w)

    if run:

        @pl.when((i == 0) | (t.w_group[i] != t.w_group[jnp.maximum(i - 1, 0)]))
        def _new_matrix():
            _widen(w, scale, wide, run, first_column if transposed else 0)

    def multiply(chunk, _):
        start = first + chunk * block.chunk
        *parts, (_, most) = _bodies(block.chunk, x.dtype)
        whole = high - start > most
        pl.when(whole)(functools.partial(multiply_rows, start, block.chunk))

        @pl.when(~whole)  # as one branch, so that whole chunks do not pass by those of all the others
        def _multiply_the_rest():
            for size, smaller in parts:
                fits = (high - start > smaller) & (high - start <= size)
                pl.when(fits)(functools.partial(multiply_rows, start, size))

    def multiply_rows(start, size):
        at = pl.multiple_of(jnp.minimum(start, block.tile - size), ALIGNMENT)
        here = pl.ds(at, size)
        product = _dot(x[here], wide[...], ((1,), (1 if transposed else 0,)))
        row = at + lax.broadcasted_iota(jnp.int32, product.shape, 0)
        member = (row >= low) & (row < high)  # no body without it: it runs beside the products
        out[here] = jnp.where(member, product, out[here].astype(jnp.float32)).astype(out.dtype)

    first = low // ALIGNMENT * ALIGNMENT

    of_group = jnp.where(t.group[i] < num_groups, high - first, 0)
    lax.fori_loop(0, pl.cdiv(of_group, block.chunk), multiply, None)

    @pl.when(t.group[i] == num_groups)
    def _past_the_last_group():
        row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
        out[...] = jnp.where(row >= low, 0.0, out[...].astype(jnp.float32)).astype(out.dtype)


def _bodies(chunk: int, dtype) -> list[tuple[int, int]]:
    """Rows of each body and of the next smaller one; float32, whose products are six times as long, has one body."""
    step = chunk if dtype == jnp.float32 else _up(pl.cdiv(chunk, BODIES), ALIGNMENT)
    sizes = sorted({min(step * part, chunk) for part in range(1, BODIES + 1)})
    return list(zip(sizes, [0, *sizes[:-1]], strict=True))


def row_candidates(num_rows, inner, columns, num_groups, dtype, w_dtype) -> list[RowBlocks]:
    """Blocks that fit the VMEM, fastest first by `_time`."""
    size, w_size = jnp.dtype(dtype).itemsize, jnp.dtype(w_dtype).itemsize
    found: dict[RowBlocks, float] = {}
    for tile in _sizes((1024, 512, 256, 128), _up(num_rows, ALIGNMENT)):
        for width in _sizes((4096, 2048, 1024, 768, 512, 256, 128), columns):
            for chunk in _sizes((512, 256, 128)[size // 4 :], tile):
                used = 2 * (tile * inner * size + inner * width * w_size + tile * width * size) + chunk * width * 4
                used += inner * width * size if w_size < size else 0
                num_blocks = pl.cdiv(columns, width)
                moved = num_blocks * num_rows * inner * size + num_groups * inner * columns * w_size
                step = _bodies(chunk, dtype)[0][0]
                products = _rows_multiplied(num_rows, num_groups, tile, chunk, step) * inner * columns
                steps = num_blocks * (num_rows // tile + num_groups)
                if used <= _vmem_limit() * VMEM_SHARE:
                    found[RowBlocks(tile, chunk, width)] = _time(products, moved, steps)
    return sorted(found, key=found.__getitem__)


# The sum over the rows of a group, xᵀ d_out: [E, K, N].


def weights(x, d_out, sizes, dtype):
    """See `gradient.Products`."""
    (num_rows, features), columns = x.shape, d_out.shape[1]
    candidates = weight_candidates(num_rows, features, columns, sizes.shape[0], x.dtype)
    key = {"K": features, "N": columns, "E": sizes.shape[0], "M": num_rows, "dtype": x.dtype.name}
    return _weights(blocks.pick("ragged_dot.weights", key, candidates), x, d_out, sizes, dtype)


def _weights(block: WeightBlocks, x, d_out, sizes, dtype):
    (num_rows, features), columns = x.shape, d_out.shape[1]
    tables, count = visits(sizes, num_rows, block.tile, of_groups=True)
    return pl.pallas_call(
        functools.partial(_weights_kernel, block),
        out_shape=jax.ShapeDtypeStruct((sizes.shape[0], features, columns), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(features, block.features), pl.cdiv(columns, block.columns), count),
            in_specs=[
                pl.BlockSpec((block.tile, block.features), lambda k, n, i, t: (t.x_tile[i], k)),
                pl.BlockSpec((block.tile, block.columns), lambda k, n, i, t: (t.x_tile[i], n)),
            ],
            out_specs=pl.BlockSpec((None, block.features, block.columns), lambda k, n, i, t: (t.group[i], k, n)),
            scratch_shapes=[pltpu.VMEM((block.features, block.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_vmem_limit()
        ),
        cost_estimate=_cost(num_rows, features, columns, x, jax.ShapeDtypeStruct((sizes.shape[0],), dtype)),
        interpret=INTERPRET if dispatch.interpreted() else False,
        name="ragged_dot_weights",
    )(tables, x, d_out)


def _weights_kernel(block: WeightBlocks, t: Visits, x, d_out, out, total):
    i = pl.program_id(2)
    low, high = t.low[i], t.high[i]
    first = low // ALIGNMENT * ALIGNMENT

    @pl.when((t.first[i] == 1) & (low == high))
    def _empty_group():
        total[...] = jnp.zeros_like(total)

    def add(start, size):
        at = pl.multiple_of(jnp.minimum(start, block.tile - size), ALIGNMENT)

        def members(rows):
            part = rows[pl.ds(at, size)]
            row = at + lax.broadcasted_iota(jnp.int32, part.shape, 0)
            member = (row >= jnp.maximum(low, start)) & (row < high)  # rows before start are summed already
            return jnp.where(member, part.astype(jnp.float32), 0.0).astype(part.dtype)

        begins = (t.first[i] == 1) & (start == first)

        @pl.when(begins)
        def _begin():
            total[...] = _dot(members(x), members(d_out), ((0,), (0,)))

        @pl.when(~begins)
        def _add():
            total[...] += _dot(members(x), members(d_out), ((0,), (0,)))

    unit = min(_summed_at_once(), block.chunk)
    whole = (high - first + unit - 1) // block.chunk  # the last of them may lack less than a unit
    rest = first + whole * block.chunk
    pl.loop(0, whole)(lambda chunk: add(first + chunk * block.chunk, block.chunk))
    if unit < block.chunk:
        pl.loop(0, pl.cdiv(jnp.maximum(high - rest, 0), unit))(lambda chunk: add(rest + chunk * unit, unit))

    @pl.when(t.last[i] == 1)
    def _store():
        out[...] = total[...].astype(out.dtype)


def weight_candidates(num_rows, features, columns, num_groups, dtype) -> list[WeightBlocks]:
    """Blocks that fit the VMEM, fastest first by `_time`."""
    size = jnp.dtype(dtype).itemsize
    found: dict[WeightBlocks, float] = {}
    for tile in _sizes((1024, 512, 256, 128), _up(num_rows, ALIGNMENT)):
        for height in _sizes((2048, 1024, 512, 256, 128), features):
            for width in _sizes((2048, 1024, 512, 256, 128), columns):
                for chunk in _sizes((512, _summed_at_once())[size // 4 :], tile):
                    used = 2 * (tile * (height + width) + height * width) * size + 2 * height * width * 4
                    across, down = pl.cdiv(columns, width), pl.cdiv(features, height)
                    moved = (num_rows * (across * features + down * columns) + num_groups * features * columns) * size
                    unit = min(_summed_at_once(), chunk)
                    products = _rows_multiplied(num_rows, num_groups, tile, chunk, unit) * features * columns
                    steps = across * down * (num_rows // tile + num_groups)
                    if used <= _vmem_limit() * VMEM_SHARE:
                        found[WeightBlocks(tile, chunk, height, width)] = _time(products, moved, steps)
    return sorted(found, key=found.__getitem__)


def _summed_at_once() -> int:
    """Rows that a matrix unit sums in one pass; fewer leave it part empty."""
    return 128 if dispatch.interpreted() else pltpu.get_tpu_info().mxu_column_size


def _rows_multiplied(num_rows: int, num_groups: int, tile: int, chunk: int, step: int) -> float:
    """What the bodies of every visit take, in rows, when visits are alike; bodies hold a multiple of step rows."""
    visits = num_rows / tile + num_groups
    rows = num_rows / visits + ALIGNMENT / 2
    return visits * (_up(math.ceil(rows), step) + BODY_COST * math.ceil(rows / chunk))


def _time(products: float, moved: int, steps: int) -> float:
    """Seconds on a chip of 400 TFLOP/s and 1 TB/s, which stands for all of them: only the order counts."""
    return max(products * 2 / 400e12, moved / 1e12) + steps * 0.35e-6


def _sizes(wanted: tuple[int, ...], longest: int) -> list[int]:
    return sorted({min(size, longest) for size in wanted}, reverse=True)


def _widen(w, scale, wide, run: int, first_row) -> None:
    """wide = w times its scales, each of `run` rows of the matrix, of which w begins at first_row."""
    step = math.gcd(run, w.shape[0])
    for at in range(0, w.shape[0], step):
        group = jnp.minimum((first_row + at) // run, scale.shape[0] - 1)  # past the matrix's end nothing is stored
        wide[at : at + step] = (w[at : at + step].astype(jnp.float32) * scale[pl.ds(group, 1)]).astype(wide.dtype)


def _dot(a, b, contract) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _cost(num_rows, inner, columns, x, w) -> pl.CostEstimate:
    moved = (num_rows * (inner + columns)) * x.dtype.itemsize + w.shape[0] * inner * columns * w.dtype.itemsize
    return pl.CostEstimate(flops=2 * num_rows * inner * columns, bytes_accessed=moved, transcendentals=0)


def _vmem_limit() -> int:
    if dispatch.interpreted():
        return VMEM_UNKNOWN
    return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


PRODUCTS = gradient.Products(rows, weights)
