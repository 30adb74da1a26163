"""The product with quantised weights on a Hopper GPU, transposed: the weights are wgmma's left operand, from registers.

wgmma takes 64 rows of its left operand and as few as 8 columns of its right one, so in decoding the weights' outputs
are the rows and the few rows of x the columns. One warpgroup streams codes and x into shared memory by TMA, many steps
ahead; the others widen codes to bfloat16 in registers, which is exact, and never write them back. A group's sums are
weighed by its scales in float32. With int8 or fp8 activations both operands go from shared memory to wgmma as they are.

Every core takes an equal share of all steps, wherever tiles of outputs begin and end (stream-K, arXiv:2301.03598), so
that none is idle while others read. A tile that two cores or more have a part of is summed by XLA, in the pass that
transposes the result, subtracts zero points, adds the bias and applies the activation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import blocks, dispatch, hopper
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.reference import finish
from pallas_kernels.quantized_matmul.tensor import FP8, QuantizedTensor, quantize_rows

WARPGROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
NUM_CORES = 132
MOST_ROWS = 128  # of x: two accumulators of them fill half of a warpgroup's registers
# Three computing warpgroups: four would ask for more registers (4 x 112 + 40) than five start with (5 x 96), and wait forever.
MOST_OUTPUTS = 192
MOST_SUMS = 128 * 128  # of a thread block, in registers and once more in shared memory
SWIZZLE = 128  # bytes


class Blocks(NamedTuple):
    """Rows of x, outputs (64 a warpgroup), and inputs of a step; and steps in flight."""

    m: int
    n: int
    k: int
    stages: int


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    """Why the kernel does not take this call."""
    x, w = arguments["x"], arguments["w"]
    if chip.platform == "cpu":
        return "jax's interpreter has neither wgmma of registers nor transposed blocks"
    if w.axis != -1:
        return f"weights must lie [N, K] (axis=-1), not axis={w.axis}: use w.mT"
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype}"
    if w.group_size is not None and w.group_size % 128:
        return f"group_size={w.group_size} is not a multiple of 128, the shortest row that TMA brings swizzled"
    if w.shape[0] % 8:
        return f"{w.shape[0]} outputs are not a multiple of 8, which a tile in shared memory has"
    if w.bits == 4 and arguments["activations"] == "int8":
        return "wgmma has no int4: widen the weights to bits=8 for int8 activations"
    return hopper.refuse(chip)


def candidates(num_rows: int, num_inputs: int, num_outputs: int, step: int, code_bits: int, x_bytes: int):
    """Blocks that fit shared memory and registers, best first.

    What matters in decoding is that all cores read alike, with about 64 KiB in flight each (a microsecond's worth and a
    margin), and that enough warpgroups widen codes: one waits for its own instructions most of the time.
    """
    rows = min(MOST_ROWS, num_rows + -num_rows % (8 if num_rows <= 32 else 16))  # as wgmma has them for int8
    found = {}
    for k in (128, 256):
        for n in (64, 128, MOST_OUTPUTS):
            if num_inputs % k or (step % k and k % step) or rows * n > MOST_SUMS:
                continue
            stage = n * k * code_bits // 8 + rows * k * x_bytes + 4 * n * max(1, k // step)
            share = -(-_num_steps(num_rows, num_inputs, num_outputs, Blocks(rows, n, k, 0)) // NUM_CORES)
            stages = min(8, share + 1, (SHARED_BYTES - 4 * rows * n - 4096) // stage)
            if stages >= 2:
                starved = max(1.0, 65536 / (stages * stage))
                widening = 1 + 64 / n
                found[Blocks(rows, n, k, stages)] = share * stage * starved * widening
    return sorted(found, key=found.__getitem__)


def _num_steps(num_rows: int, num_inputs: int, num_outputs: int, block: Blocks) -> int:
    return -(-num_rows // block.m) * -(-num_outputs // block.n) * (num_inputs // block.k)


def quantized_matmul(
    x: Array, w: QuantizedTensor, bias: Array | None, *, activations: str | None, activation: str | None, out_dtype: Any
) -> Array:
    """See `api.quantized_matmul`; x is [M, K]."""
    num_rows, row_scales = len(x), None
    if activations is not None:
        x, row_scales = quantize_rows(x, "int8" if activations == "int8" else "fp8")
    x = jnp.pad(x, ((0, 0), (0, w.padded_size - w.size)))
    codes = w.data
    if w.bits == 4:  # the same bytes
        codes = lax.bitcast_convert_type(lax.bitcast_convert_type(codes, jnp.int8), jnp.int4).reshape(len(codes), -1)
    num_outputs, size = codes.shape
    step = size // w.scales.shape[0]
    code_bits = 4 if w.bits == 4 else 8
    key = {"rows": min(1 << (num_rows - 1).bit_length(), 512), "inputs": size, "outputs": num_outputs, "bits": w.bits}
    found = candidates(num_rows, size, num_outputs, step, code_bits, x.dtype.itemsize)
    block = blocks.pick("quantized_matmul.forward", key | {"group": w.group_size}, found)
    x_rows = jnp.pad(x, ((0, -num_rows % block.m), (0, 0)))
    out = _products(x_rows, codes, w.scales, w.group_size is not None, block).T[:num_rows]
    if w.group_size is None:
        out = out * w.scales
    if w.zeros is not None:
        sums = jnp.sum(x.reshape(num_rows, -1, step), axis=2, dtype=jnp.float32)
        out = out - jnp.dot(sums, w.zeros.astype(jnp.float32) * w.scales, precision="highest")
    if row_scales is not None:
        out = out * row_scales
    return finish(out, bias, activation, out_dtype)


def input_gradient(g: Array, w: QuantizedTensor, dtype: Any) -> Array:
    """g w^T of g [M, N], by XLA: there are many rows in training, so that widening the weights costs little beside it.

    (Summed over N the codes would have to be transposed in registers, which a byte's layout does not allow.)
    """
    return xla.input_gradient(g, w, dtype)


def _products(x: Array, codes: Array, scales: Array, grouped: bool, block: Blocks) -> Array:
    """[N, M] float32: sums over the inputs, weighed by the scales of groups if there are groups."""
    plgpu = hopper.mosaic_gpu()
    (num_rows, size), num_outputs = x.shape, len(codes)
    num_m, num_n, num_k = num_rows // block.m, -(-num_outputs // block.n), size // block.k
    num_steps = num_m * num_n * num_k
    programs = min(NUM_CORES, num_steps)
    counts = _parts(num_m * num_n, num_k, programs)
    group = size // len(scales) if grouped else size
    scales = jnp.pad(scales, ((0, 0), (0, -num_outputs % 4)))  # TMA wants rows of whole 16 bytes
    per_step = max(1, block.k // group)
    steps_per_group = max(1, group // block.k)
    num_warpgroups = block.n // WARPGROUP_ROWS
    sums_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    total_dtype = jnp.float32 if grouped else sums_dtype

    def kernel(x_gmem, codes_gmem, scales_gmem, out_gmem, out_smem):
        program = lax.axis_index("program")
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        first = lax.div(program * num_steps, programs)
        end = lax.div((program + 1) * num_steps, programs)

        def place(step):
            """(m, n, k) of one of this program's steps."""
            tile, k = lax.div(first + step, num_k), lax.rem(first + step, num_k)
            return lax.div(tile, num_n), lax.rem(tile, num_n), k

        def store(tile, total):
            """One part of a tile's sums, in the order of the programs that have one."""
            part = program - lax.div((tile * num_k + 1) * programs - 1, num_steps)
            m, n = lax.div(tile, num_n), lax.rem(tile, num_n)
            out_smem[rows] = total.astype(jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[rows],
                out_gmem.at[
                    part, pl.ds(n * block.n + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(m * block.m, block.m)
                ],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def nothing():
            return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS, block.m), 0, total_dtype), plgpu.Layout.WGMMA)

        def compute(run_pipeline):
            run_pipeline(nothing())

        def multiply(x_smem, codes_smem, columns):
            left = codes_smem.at[rows, columns]
            if x.dtype == jnp.bfloat16:
                # Each thread loads 32 bits at once and swaps codes with its neighbours into wgmma's layout.
                wide = plgpu.Layout.WGMMA_UPCAST_4X if codes.dtype == jnp.int4 else plgpu.Layout.WGMMA_UPCAST_2X
                left = plgpu.layout_cast(plgpu.layout_cast(left[...], wide), plgpu.Layout.WGMMA)
                if left.dtype == FP8:  # Hopper takes it to float32 only
                    left = left.astype(jnp.float32)
                left = left.astype(jnp.bfloat16)

            def into(acc):
                plgpu.wgmma(acc, left, x_smem.at[:, columns].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc[...]

            return pl.run_scoped(into, plgpu.ACC((WARPGROUP_ROWS, block.m), sums_dtype))

        def body(indices, x_smem, codes_smem, *scales_smem_and_total):
            total = scales_smem_and_total[-1]
            if grouped:
                scales_smem = scales_smem_and_total[0]
                for at in range(per_step):
                    sums = multiply(x_smem, codes_smem, pl.ds(at * min(group, block.k), min(group, block.k)))
                    scale = plgpu.load(scales_smem, (at, rows), layout=plgpu.Layout.WGMMA.reduce(1))
                    total += sums * lax.broadcast_in_dim(scale, sums.shape, (0,))
            else:
                total += multiply(x_smem, codes_smem, slice(None))
            step = first + indices[0]
            tile, k = lax.div(step, num_k), lax.rem(step, num_k)
            done = (k == num_k - 1) | (step == end - 1)

            def next_tile(total):
                store(tile, total)
                return nothing()

            return lax.cond(done, next_tile, lambda total: total, total)

        specs = [
            _block_spec((block.m, block.k), lambda step: (place(step)[0], place(step)[2]), x.dtype),
            _block_spec((block.n, block.k), lambda step: place(step)[1:], codes.dtype),
        ]
        operands = [x_gmem, codes_gmem]
        if grouped:
            shape, at = (per_step, block.n), lambda step: (place(step)[2] // steps_per_group, place(step)[1])
            specs.append(plgpu.BlockSpec(shape, at, memory_space=plgpu.SMEM))
            operands.append(scales_gmem)
        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(end - first,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=num_warpgroups,
            max_concurrent_steps=block.stages,
            compute_context=compute,
        )(*operands)

    most, shape = int(counts.max()), (num_n * block.n, num_rows)
    parts = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((most, *shape), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((block.n, block.m), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, codes, scales)
    there = (np.arange(most)[:, None] < counts).reshape(most, num_m, num_n, 1, 1).transpose(0, 2, 3, 1, 4)
    parts = jnp.where(there, parts.reshape(most, num_n, block.n, num_m, block.m), 0)
    return jnp.sum(parts, axis=0).reshape(shape)[:num_outputs]


def _parts(num_tiles: int, num_k: int, programs: int) -> np.ndarray:
    """How many programs have a share of each tile's steps."""
    first = np.arange(num_tiles) * num_k
    owner_of_first, owner_of_last = (
        ((step + 1) * programs - 1) // (num_tiles * num_k) for step in (first, first + num_k - 1)
    )
    return owner_of_last - owner_of_first + 1


def _block_spec(shape: tuple[int, int], index_map, dtype) -> Any:
    plgpu = hopper.mosaic_gpu()
    bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits
    swizzle = min(SWIZZLE, shape[1] * bits // 8)
    tiles = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.BlockSpec(shape, index_map, transforms=tiles, memory_space=plgpu.SMEM)
