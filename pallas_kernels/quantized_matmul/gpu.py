"""The product with quantised weights on a Hopper GPU, transposed: the weights are wgmma's left operand, from registers.

wgmma takes 64 rows of its left operand and as few as 8 columns of its right one, so in decoding the weights' outputs
are the rows and the few rows of x the columns. One warpgroup streams codes and x into shared memory by TMA, many steps
ahead; the others widen codes to bfloat16 in registers, which is exact, and never write them back. A group's sums are
weighed by its scales in float32. With int8 or fp8 activations both operands go from shared memory to wgmma as they are.

Few outputs would leave most of the chip idle, so blocks of inputs go to several thread blocks as well; XLA then sums
the parts in the pass that transposes the result, subtracts zero points, adds the bias and applies the activation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import blocks, dispatch
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.reference import finish
from pallas_kernels.quantized_matmul.tensor import FP8, QuantizedTensor, quantize_rows

WARPGROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
NUM_CORES = 132
MOST_ROWS = 128  # of x: two accumulators of them fill half of a warpgroup's registers
SWIZZLE = 128  # bytes


class Blocks(NamedTuple):
    """Rows of x, outputs (64 a warpgroup), and inputs of a step, steps in flight, and parts that inputs are split in."""

    m: int
    n: int
    k: int
    stages: int
    splits: int


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
    if not any(name in chip.kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        return f"is written for Hopper (wgmma), not for {chip.kind}"
    return None


def candidates(num_rows: int, num_inputs: int, num_outputs: int, step: int, code_bits: int, x_bytes: int):
    """Blocks that fit shared memory, best first.

    What matters in decoding is bytes in flight on every core: about 40 KiB each at a latency of a microsecond.
    """
    rows = min(MOST_ROWS, num_rows + -num_rows % 8)
    found = []
    for k in (128, 256):
        for n in (64, 128):
            if num_inputs % k or (step % k and k % step):
                continue
            stage = n * k * code_bits // 8 + rows * k * x_bytes + 4 * n * max(1, k // step)
            stages = min(8, num_inputs // k, (SHARED_BYTES - 4 * rows * n - 2048) // stage)
            tiles = -(-num_outputs // n) * -(-num_rows // rows)
            steps = num_inputs // k
            for splits in (s for s in (1, 2, 4, 8) if steps % s == 0 and steps // s >= min(4, steps)):
                if stages >= 2:
                    found.append((Blocks(rows, n, k, min(stages, steps // splits), splits), tiles * splits, stage))

    def cost(entry: tuple[Blocks, int, int]) -> tuple:
        block, tiles, stage = entry
        waves = -(-tiles // NUM_CORES)
        idle = waves * NUM_CORES / tiles
        parts = 8.0 * num_rows * num_outputs * block.splits  # written and read, float32
        weights = num_inputs * num_outputs * code_bits / 8 * -(-num_rows // block.m)
        starved = max(1.0, 40960 / (block.stages * stage))
        return ((weights * idle + parts) * starved, block)

    return [block for block, _, _ in sorted(found, key=cost)]


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
    parts = _products(jnp.pad(x, ((0, -num_rows % block.m), (0, 0))), codes, w.scales, w.group_size is not None, block)
    out = jnp.sum(parts, axis=0).T[:num_rows]
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
    """[splits, N, M] float32: sums over a part of the inputs, weighed by the scales of groups if there are groups."""
    plgpu = _mosaic_gpu()
    (num_rows, size), num_outputs = x.shape, len(codes)
    num_m, num_n, num_k = num_rows // block.m, -(-num_outputs // block.n), size // block.k // block.splits
    group = size // len(scales) if grouped else size
    scales = jnp.pad(scales, ((0, 0), (0, -num_outputs % 4)))  # TMA wants rows of whole 16 bytes
    per_step = max(1, block.k // group)
    steps_per_group = max(1, group // block.k)
    num_warpgroups = block.n // WARPGROUP_ROWS
    sums_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def kernel(x_gmem, codes_gmem, scales_gmem, out_gmem, out_smem):
        n, m, split = (lax.axis_index(name) for name in ("n", "m", "split"))
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        first = split * num_k

        def compute(run_pipeline):
            def from_zero(acc):
                run_pipeline(acc)
                return acc[...].astype(jnp.float32)

            if grouped:
                zeros = jnp.full((WARPGROUP_ROWS, block.m), 0.0, jnp.float32)
                total = run_pipeline(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
            else:
                total = pl.run_scoped(from_zero, plgpu.ACC((WARPGROUP_ROWS, block.m), sums_dtype))
            out_smem[rows] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                out_smem.at[rows],
                out_gmem.at[
                    split, pl.ds(n * block.n + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(m * block.m, block.m)
                ],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def multiply(acc, x_smem, codes_smem, columns):
            left = codes_smem.at[rows, columns]
            if x.dtype == jnp.bfloat16:
                left = left[...]
                if left.dtype == FP8:  # Hopper takes it to float32 only
                    left = left.astype(jnp.float32)
                left = left.astype(jnp.bfloat16)
            plgpu.wgmma(acc, left, plgpu.transpose_ref(x_smem.at[:, columns], (1, 0)))
            plgpu.wgmma_wait(0)

        def body(_, x_smem, codes_smem, *scales_smem_and_total):
            if not grouped:
                (acc,) = scales_smem_and_total
                multiply(acc, x_smem, codes_smem, slice(None))
                return acc
            scales_smem, total = scales_smem_and_total
            for at in range(per_step):
                columns = pl.ds(at * min(group, block.k), min(group, block.k))

                def of_group(acc, columns=columns):
                    multiply(acc, x_smem, codes_smem, columns)
                    return acc[...]

                sums = pl.run_scoped(of_group, plgpu.ACC((WARPGROUP_ROWS, block.m), sums_dtype)).astype(jnp.float32)
                scale = plgpu.load(scales_smem, (at, rows), layout=plgpu.Layout.WGMMA.reduce(1))
                total += sums * lax.broadcast_in_dim(scale, sums.shape, (0,))
            return total

        specs = [
            _block_spec((block.m, block.k), lambda k: (m, first + k), x.dtype),
            _block_spec((block.n, block.k), lambda k: (n, first + k), codes.dtype),
        ]
        operands = [x_gmem, codes_gmem]
        if grouped:
            specs.append(
                plgpu.BlockSpec(
                    (per_step, block.n), lambda k: ((first + k) // steps_per_group, n), memory_space=plgpu.SMEM
                )
            )
            operands.append(scales_gmem)
        plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(num_k,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=num_warpgroups,
            max_concurrent_steps=block.stages,
            compute_context=compute,
        )(*operands)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((block.splits, num_outputs, num_rows), jnp.float32),
        grid=(num_n, num_m, block.splits),
        grid_names=("n", "m", "split"),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((block.n, block.m), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, codes, scales)


def _mosaic_gpu() -> Any:
    from jax.experimental.pallas import mosaic_gpu  # only where it runs: it needs absl, which jax does not bring

    return mosaic_gpu


def _block_spec(shape: tuple[int, int], index_map, dtype) -> Any:
    plgpu = _mosaic_gpu()
    bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits
    swizzle = min(SWIZZLE, shape[1] * bits // 8)
    tiles = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.BlockSpec(shape, index_map, transforms=tiles, memory_space=plgpu.SMEM)
