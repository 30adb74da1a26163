"""The grouped product on a Hopper GPU: a thread block for each visit of a tile of rows to a group and block of columns.

One warpgroup streams rows and the group's matrix into shared memory by TMA, the others multiply 64 rows each by
wgmma. A result's rows that belong to another group must stay as they are, and TMA copies of fixed shapes only: so the
rows are stored in pieces of powers of two, those that make up their number.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import blocks, dispatch, hopper
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from pallas_kernels.ragged_dot import gradient, xla
from pallas_kernels.ragged_dot.tiles import visits

DTYPES = (jnp.bfloat16, jnp.float16)
WARPGROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
SWIZZLE = 128  # bytes
ROW_BYTES = 16  # TMA takes rows of a multiple of that
TILE_ROWS = 8


class RowBlocks(NamedTuple):
    """Rows (64 a warpgroup), columns, contracted at a step, steps in flight."""

    m: int
    n: int
    k: int
    stages: int


class WeightBlocks(NamedTuple):
    """Of the product that sums over rows: the result's block, rows summed at a step, steps in flight."""

    features: int
    columns: int
    rows: int
    stages: int


WEIGHT_CANDIDATES = (WeightBlocks(128, 256, 64, 3), WeightBlocks(128, 128, 64, 4))  # they fit any shared memory


def ragged_dot(x, w, group_sizes):
    """See `api.ragged_dot`."""
    return gradient.ragged_dot(PRODUCTS, x, w, group_sizes)


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    x, w = arguments["x"], arguments["w"]
    if isinstance(w, QuantizedTensor):
        return "takes no quantised weights: wgmma reads its right operand from shared memory as it is"
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"multiplies bfloat16 and float16, both alike, not {x.dtype} and {w.dtype}"
    multiple, tile = ROW_BYTES // x.dtype.itemsize, SWIZZLE // x.dtype.itemsize
    for name, size in zip("KN", w.shape[1:], strict=True):
        if size % multiple or (size > tile and size % tile):
            return f"{name}={size} is neither a multiple of {tile} nor a smaller one of {multiple}, as TMA's tiles are"
    return hopper.refuse(chip)


def rows(x, w, scale, sizes, transposed):
    """See `gradient.Products`; there is no scale."""
    columns = w.shape[1 if transposed else 2]
    found = row_candidates(x.shape[0], columns, w.shape[0], x.dtype)
    key = {"M": x.shape[0], "K": x.shape[1], "N": columns, "E": w.shape[0], "dtype": x.dtype.name}
    direction = "ragged_dot.transposed" if transposed else "ragged_dot.forward"
    return _rows(blocks.pick(direction, key, found), transposed, x, w, sizes)


def _rows(block: RowBlocks, transposed: bool, x, w, sizes):
    plgpu = hopper.mosaic_gpu()
    if dispatch.interpreted():
        w, transposed = (w.mT if transposed else w), False  # the interpreter knows no wgmma of a transposed reference
        x, w, cut = _whole_blocks(block, x, w)
    else:
        cut = slice(len(x))
        x = _whole_tiles(x)
    (num_rows, inner), columns = x.shape, w.shape[1 if transposed else 2]
    tables, count = visits(sizes, num_rows, block.m)
    num_visits, num_groups = tables.tile.shape[0], w.shape[0]

    def kernel(tile_ref, group_ref, low_ref, high_ref, count_ref, x_gmem, w_gmem, out_gmem, out_smem):
        visit, column = lax.axis_index("visit"), lax.axis_index("column")
        warpgroup = lax.axis_index("warpgroup")
        own = warpgroup * WARPGROUP_ROWS

        def store(tile, total):
            """Those of the warpgroup's rows that are the group's."""
            low = jnp.clip(low_ref[visit] - own, 0, WARPGROUP_ROWS)
            number = jnp.clip(high_ref[visit] - own, 0, WARPGROUP_ROWS) - low
            out_smem[pl.ds(own, WARPGROUP_ROWS)] = total.astype(out_gmem.dtype)
            plgpu.commit_smem()
            size = WARPGROUP_ROWS
            while size:
                start = own + low + number // (2 * size) * (2 * size)  # behind all larger pieces

                @pl.when(number & size != 0)
                def _copy(size=size, start=start):
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[pl.ds(start, size)],
                        out_gmem.at[pl.ds(tile * block.m + start, size), pl.ds(column * block.n, block.n)],
                    )

                size //= 2
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def multiply(tile, group):
            def compute(run_pipeline):
                def from_zero(acc):
                    run_pipeline(acc)
                    return acc[...]

                store(tile, pl.run_scoped(from_zero, plgpu.ACC((WARPGROUP_ROWS, block.n), jnp.float32)))

            def body(_, x_smem, w_smem, acc):
                left = x_smem.at[pl.ds(own, WARPGROUP_ROWS)]
                plgpu.wgmma(acc, left, w_smem.transpose((1, 0)) if transposed else w_smem)
                plgpu.wgmma_wait(0)
                return acc

            w_shape = (block.n, block.k) if transposed else (block.k, block.n)
            plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(pl.cdiv(inner, block.k),),
                memory_registers=40,
                in_specs=[
                    _block_spec((block.m, block.k), lambda k: (tile, k), x.dtype),
                    _block_spec(w_shape, lambda k: (column, k) if transposed else (k, column), w.dtype),
                ],
                wg_axis="warpgroup",
                num_compute_wgs=block.m // WARPGROUP_ROWS,
                max_concurrent_steps=block.stages,
                compute_context=compute,
            )(x_gmem, w_gmem.at[group])

        @pl.when(visit < count_ref[0])
        def _visit():
            tile, group = tile_ref[visit], group_ref[visit]

            @pl.when(group < num_groups)
            def _multiply():
                multiply(tile, group)

            @pl.when((group == num_groups) & (warpgroup < block.m // WARPGROUP_ROWS))
            def _past_the_last_group():
                zeros = jnp.zeros((WARPGROUP_ROWS, block.n), jnp.float32)
                store(tile, zeros if dispatch.interpreted() else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, columns), x.dtype),
        grid=(num_visits, pl.cdiv(columns, block.n)),
        grid_names=("visit", "column"),
        num_threads=block.m // WARPGROUP_ROWS + 1,
        thread_name="warpgroup",
        scratch_types={"out_smem": plgpu.SMEM((block.m, block.n), x.dtype)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **_interpreted(),
    )(tables.tile, tables.group, tables.low, tables.high, count[None], x, w)[cut]


def row_candidates(num_rows: int, columns: int, num_groups: int, dtype) -> list[RowBlocks]:
    """Blocks that fit shared memory, least work first: small groups waste what is left of their tiles."""
    size = jnp.dtype(dtype).itemsize
    found: dict[RowBlocks, float] = {}
    for m in (128, 64):
        for n in (256, 128, 64):
            k = SWIZZLE // size
            stages = min(6, (SHARED_BYTES - m * n * size - 4096) // ((m + n) * k * size))
            multiplied = num_rows + num_groups * m  # about
            loads = 1 + 48 * (m + n) / (m * n)  # what shared memory has to bring for a product, roughly
            wasted = pl.cdiv(columns, n) * n / columns
            if stages >= 2:
                found[RowBlocks(m, n, k, stages)] = multiplied * loads * wasted
    return sorted(found, key=found.__getitem__)


# The sum over the rows of a group, xᵀ d_out: [E, K, N].


def weights(x, d_out, sizes, dtype):
    """See `gradient.Products`; rows past the last group are read with d_out, so there it has to be finite."""
    if dispatch.interpreted():  # the interpreter knows no wgmma of a transposed reference
        return xla.weights(x, d_out, sizes, dtype)
    key = {"M": len(x), "K": x.shape[1], "N": d_out.shape[1], "E": len(sizes), "dtype": x.dtype.name}
    return _weights(blocks.pick("ragged_dot.weights", key, WEIGHT_CANDIDATES), x, d_out, sizes, dtype)


def _weights(block: WeightBlocks, x, d_out, sizes, dtype):
    plgpu = hopper.mosaic_gpu()
    x, d_out = _whole_tiles(x), _whole_tiles(d_out)
    num_groups, features, columns = sizes.shape[0], x.shape[1], d_out.shape[1]
    num_rows = x.shape[0]
    ends = jnp.minimum(jnp.cumsum(sizes), num_rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])

    def kernel(start_ref, end_ref, x_gmem, d_gmem, out_gmem, out_smem):
        group, height, width = (lax.axis_index(name) for name in ("group", "height", "width"))
        own = lax.axis_index("warpgroup") * WARPGROUP_ROWS
        start, end = start_ref[group], end_ref[group]
        first = start // block.rows  # blocks lie where TMA's tiles do, not where groups begin
        last = jnp.maximum(pl.cdiv(end, block.rows) - 1, first)  # an empty group has a step too, of zeros

        def compute(run_pipeline):
            def from_zero(acc):
                run_pipeline(acc)
                return acc[...]

            total = pl.run_scoped(from_zero, plgpu.ACC((WARPGROUP_ROWS, block.columns), jnp.float32))
            out_smem[pl.ds(own, WARPGROUP_ROWS)] = total.astype(out_gmem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[pl.ds(own, WARPGROUP_ROWS)],
                out_gmem.at[
                    group,
                    pl.ds(height * block.features + own, WARPGROUP_ROWS),
                    pl.ds(width * block.columns, block.columns),
                ],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def body(indices, x_smem, d_smem, acc):
            (step,) = indices
            mine = x_smem.at[:, pl.ds(own, WARPGROUP_ROWS)]

            low, high = (row - (first + step) * block.rows for row in (start, end))

            @pl.when((low > 0) | (high < block.rows))
            def _clear_rows_of_other_groups():
                row = lax.broadcasted_iota(jnp.int32, (block.rows, WARPGROUP_ROWS), 0)
                row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
                part = mine[...]
                mine[...] = jnp.where((row >= low) & (row < high), part, jnp.zeros_like(part))
                plgpu.commit_smem()

            plgpu.wgmma(acc, mine.transpose((1, 0)), d_smem)
            plgpu.wgmma_wait(0)
            return acc

        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(last - first + 1,),
            memory_registers=40,
            in_specs=[
                _block_spec((block.rows, block.features), lambda r: (first + r, height), x.dtype),
                _block_spec((block.rows, block.columns), lambda r: (first + r, width), x.dtype),
            ],
            wg_axis="warpgroup",
            num_compute_wgs=block.features // WARPGROUP_ROWS,
            max_concurrent_steps=block.stages,
            compute_context=compute,
        )(x_gmem, d_gmem)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_groups, features, columns), dtype),
        grid=(num_groups, pl.cdiv(features, block.features), pl.cdiv(columns, block.columns)),
        grid_names=("group", "height", "width"),
        num_threads=block.features // WARPGROUP_ROWS + 1,
        thread_name="warpgroup",
        scratch_types={"out_smem": plgpu.SMEM((block.features, block.columns), dtype)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(starts, ends, x, d_out)


def _block_spec(shape: tuple[int, int], index_map, dtype) -> Any:
    plgpu, size = hopper.mosaic_gpu(), jnp.dtype(dtype).itemsize
    tiles = (plgpu.TilingTransform((8, SWIZZLE // size)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.BlockSpec(shape, index_map, transforms=tiles, memory_space=plgpu.SMEM)


def _whole_tiles(x):
    """Rows up to a multiple of a tile's; those past the last group are zeros in the result, and not summed."""
    return jnp.pad(x, ((0, -len(x) % TILE_ROWS), (0, 0)))


def _whole_blocks(block: RowBlocks, x, w):
    """x and w with zeros up to whole blocks, and what to cut from the result: an interpreted copy may not pass an end."""
    cut = slice(x.shape[0]), slice(w.shape[2])
    x = jnp.pad(x, [(0, -x.shape[0] % block.m), (0, -x.shape[1] % block.k)])
    return x, jnp.pad(w, [(0, 0), (0, -w.shape[1] % block.k), (0, -w.shape[2] % block.n)]), cut


def _interpreted() -> dict[str, Any]:
    if not dispatch.interpreted():
        return {}
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return {"interpret": InterpretGPUParams()}


PRODUCTS = gradient.Products(rows, weights)
