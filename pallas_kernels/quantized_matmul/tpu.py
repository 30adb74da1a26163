"""The product with quantised weights on a TPU: codes go from HBM to VMEM as they are and are widened there.

A step of the grid multiplies a block of x with a block of codes, group by group, and weighs each group's sums by its
scales: out = sum over groups of scale (x code - zero sum(x)). So codes enter the matrix unit as they are, exactly, and
scales cost one multiplication an output and group instead of one a weight.

int4: four rows of bytes make a row of words of eight codes. Word >> 4 j & 0x000f000f are two codes, and with the right
bits above them two bfloat16s, 128 + code + 8, three operations for 2,048 weights; the 136 goes where the zero point
goes. Codes come out in another order than they went in, and x (or, in the gradient, the result) is put in that order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.quantized_matmul.reference import finish
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, quantize_rows

UNIT = 64  # codes in a column of int4 words of one register: the order changes inside a unit only
LANES = 128
ROWS = 8  # of a float32 register
MANY_ROWS = 256  # from here on the matrix unit is the limit, and depth is worth more than exact scales
BF16_128 = 0x43004300  # two bfloat16s of 128, whose last bits count ones
FLOAT_OFFSET, INT_OFFSET = 136, 8  # what unpacked int4 codes are too large by


class Blocks(NamedTuple):
    """Rows of x, outputs, and inputs of one step."""

    m: int
    n: int
    k: int


class _Plan(NamedTuple):
    """What a kernel is specialised for."""

    blocks: Blocks
    bits: Any
    step: int  # inputs between two uses of scales
    grouped: bool
    zeros: bool
    integer: bool  # activations are int8
    exact: bool  # x is float32: int4 codes lose their 136 before the product, not in its sums
    folded: bool  # scales are multiplied into the weights, rounded to x's dtype, and groups are summed in one product
    row_scales: bool
    bias: bool
    num_k: int
    activation: str | None

    @property
    def extra(self) -> int:
        """What unpacked codes are too large by."""
        return 0 if self.bits != 4 or self.exact else INT_OFFSET if self.integer else FLOAT_OFFSET

    @property
    def offsets(self) -> bool:
        """Whether sums are corrected for zero points."""
        return not self.folded and (self.zeros or self.extra != 0)


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    """Why the kernel does not take this call."""
    x, w, activations = arguments["x"], arguments["w"], arguments["activations"]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x of {x.dtype} has no matrix unit on a TPU"
    if w.axis != -2:
        return f"weights must lie [K, N] (axis=-2), not axis={w.axis}: use w.mT"
    if w.group_size is not None and w.group_size % UNIT:
        return f"group_size={w.group_size} is not a multiple of {UNIT}, its smallest step"
    if chip.platform != "tpu":
        return None
    info = pltpu.get_tpu_info()
    if activations == "int8" and not info.int8_ops_per_second:
        return f"{chip.kind} has no int8 matrix unit"
    if w.bits == "fp8" and not info.fp8_ops_per_second:
        return f"{chip.kind} has no fp8"
    return None


def candidates(num_rows: int, num_inputs: int, num_outputs: int, step: int, code_bytes: int | float) -> list[Blocks]:
    """Blocks that fit half of the chip's VMEM, best first.

    A step costs about as much as reading 512 KiB, and each block of rows reads all weights again: so as many rows as
    possible up to what saturates the matrix unit, then weights by the mebibyte.
    """
    vmem = _vmem_bytes()
    rows = min(512, num_rows + -num_rows % ROWS)
    found = []
    for k in (k for k in range(step, num_inputs + 1, step) if num_inputs % k == 0 and k % LANES == 0):
        for n in {min(n, num_outputs + -num_outputs % LANES) for n in (128, 256, 512, 1024, 2048)}:
            block = Blocks(rows, n, k)
            if _block_bytes(block, code_bytes) <= vmem // 2 and k * n <= 2**21:
                found.append(block)
    found = found or [Blocks(min(rows, 128), LANES, step)]

    def cost(block: Blocks) -> float:
        steps = -(-num_outputs // block.n) * (num_inputs // block.k)
        wasted = (-num_outputs % block.n) * num_inputs * code_bytes
        sums = num_rows * num_outputs * 4.0 * (num_inputs // block.k)
        return steps * 2**19 + wasted + sums / 16

    return sorted(found, key=lambda block: (cost(block), block))


def _block_bytes(block: Blocks, code_bytes: int | float) -> int:
    """x, codes and result twice (one coming, one in use), the accumulator, and the codes widened."""
    x, codes = block.m * block.k * 4, int(block.k * block.n * code_bytes)
    return 2 * (x + codes + block.m * block.n * 4) + block.m * block.n * 8 + block.k * block.n * 2


def _vmem_bytes() -> int:
    return 32 * 2**20 if dispatch.interpreted() else pltpu.get_tpu_info().vmem_capacity_bytes


def quantized_matmul(
    x: Array, w: QuantizedTensor, bias: Array | None, *, activations: str | None, activation: str | None, out_dtype: Any
) -> Array:
    """See `api.quantized_matmul`; x is [M, K]."""
    row_scales = None
    if activations is not None:
        x, row_scales = quantize_rows(x, "int8" if activations == "int8" else "fp8")
    x = jnp.pad(x, ((0, 0), (0, w.padded_size - w.size)))
    if w.bits == 4:
        x = _in_order(x, integer=activations == "int8")
    return _forward(x, row_scales, w, bias, activation, out_dtype, _pick("forward", x, w))


def _pick(direction: str, x: Array, w: QuantizedTensor) -> Blocks:
    size, outputs = w.padded_size, w.data.shape[1]
    step = w.group_size or LANES
    rows = 1 << (x.shape[0] - 1).bit_length()
    key = {"rows": min(rows, 512), "inputs": size, "outputs": outputs, "bits": w.bits, "group": w.group_size}
    code_bytes = 0.5 if w.bits == 4 else 1
    found = candidates(x.shape[0], size, outputs, step * (LANES // step if step < LANES else 1), code_bytes)
    return blocks.pick(f"quantized_matmul.{direction}", key, found)


def _in_order(x: Array, integer: bool) -> Array:
    """The columns of [M, K] in the order in which `_widened` gives the rows of int4 weights."""
    word = (8, 4, 2) if integer else (8, 2, 4)  # k = 8 word + 2 byte + half, or 8 word + 4 half-word + shift
    units = x.reshape(x.shape[0], -1, *word)
    return units.transpose(0, 1, 4, 2, 3).reshape(x.shape)


def _out_of_order(x: Array) -> Array:
    """Undoes `_in_order` of floats."""
    return x.reshape(x.shape[0], -1, 4, 8, 2).transpose(0, 1, 3, 4, 2).reshape(x.shape)


def _forward(x, row_scales, w: QuantizedTensor, bias, activation, out_dtype, block: Blocks) -> Array:
    (num_rows, size), num_outputs = x.shape, w.data.shape[1]
    grouped, ratio = w.group_size is not None, 2 if w.bits == 4 else 1
    num_k = size // block.k
    plan = _Plan(
        blocks=block,
        bits=w.bits,
        step=w.group_size or block.k,
        grouped=grouped,
        zeros=w.zeros is not None,
        integer=x.dtype == jnp.int8,
        exact=x.dtype == jnp.float32,
        folded=grouped and block.m >= MANY_ROWS and x.dtype != jnp.int8,
        row_scales=row_scales is not None,
        bias=bias is not None,
        num_k=num_k,
        activation=activation,
    )
    per_step = block.k // plan.step  # groups in a block

    def by_group(values):  # one block of scales a step, or the same for all
        shape = (num_k, per_step, num_outputs) if grouped else (1, 1, num_outputs)
        spec = pl.BlockSpec((None, shape[1], block.n), lambda m, n, k: (k if grouped else 0, 0, n))
        return values.reshape(shape), spec

    operands = [
        (x, pl.BlockSpec((block.m, block.k), lambda m, n, k: (m, k))),
        (w.data, pl.BlockSpec((block.k // ratio, block.n), lambda m, n, k: (k, n))),
        by_group(w.scales),
    ]
    if w.zeros is not None:
        operands.append(by_group(w.zeros))
    if plan.offsets:
        parts = x.reshape(num_rows, num_k if grouped else 1, per_step if grouped else 1, -1)
        sums = jnp.sum(parts, axis=3, dtype=jnp.float32).swapaxes(0, 1)
        spec = pl.BlockSpec((None, block.m, sums.shape[2]), lambda m, n, k: (k if grouped else 0, m, 0))
        operands.append((sums, spec))
    if row_scales is not None:
        operands.append((row_scales, pl.BlockSpec((block.m, 1), lambda m, n, k: (m, 0))))
    if bias is not None:
        operands.append((bias.reshape(1, -1), pl.BlockSpec((1, block.n), lambda m, n, k: (0, n))))
    scratch = [pltpu.VMEM((block.m, block.n), jnp.int32 if plan.integer and not grouped else jnp.float32)]
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=(-(-num_rows // block.m), -(-num_outputs // block.n), num_k),
        in_specs=[spec for _, spec in operands],
        out_specs=pl.BlockSpec((block.m, block.n), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), out_dtype),
        scratch_shapes=scratch,
        compiler_params=_compiler_params(),
        interpret=_interpret(),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * size * num_outputs,
            bytes_accessed=w.nbytes
            + x.size * x.dtype.itemsize
            + num_rows * num_outputs * jnp.dtype(out_dtype).itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul",
    )(*(value for value, _ in operands))


def _interpret() -> Any:
    return dispatch.interpreted()


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_vmem_bytes() * 3 // 4
    )


def _forward_kernel(plan: _Plan, x_ref, codes_ref, scales_ref, *refs):
    rest = list(refs)
    zeros_ref = rest.pop(0) if plan.zeros else None
    sums_ref = rest.pop(0) if plan.offsets else None
    row_scales_ref = rest.pop(0) if plan.row_scales else None
    bias_ref = rest.pop(0) if plan.bias else None
    out_ref, acc_ref = rest
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def codes(group):
        return _block_of_codes(plan, codes_ref, slice(group * plan.step, (group + 1) * plan.step))

    groups = range(plan.blocks.k // plan.step)
    if plan.folded:
        weights = [_dequantised(codes(group), plan.extra, scales_ref, zeros_ref, group) for group in groups]
        whole = jnp.concatenate([part.astype(x_ref.dtype) for part in weights], axis=0)
        acc_ref[...] += _product(x_ref[...], whole, 0)
    elif plan.grouped:
        parts = []
        for group in groups:
            total = _product(x_ref[:, group * plan.step : (group + 1) * plan.step], codes(group), 0)
            parts.append(total.astype(jnp.float32) * scales_ref[group : group + 1])
        if sums_ref is not None:
            parts.append(-_correction(plan, sums_ref, scales_ref, zeros_ref))
        acc_ref[...] += functools.reduce(jnp.add, parts)
    else:
        acc_ref[...] += _product(x_ref[...], codes(0), 0)

    @pl.when(k == plan.num_k - 1)
    def _():
        out = acc_ref[...]
        if not plan.grouped:
            out = out.astype(jnp.float32) * scales_ref[...]
            if sums_ref is not None:
                out = out - _correction(plan, sums_ref, scales_ref, zeros_ref)
        if row_scales_ref is not None:
            out = out * row_scales_ref[...]
        bias = None if bias_ref is None else bias_ref[...]
        out_ref[...] = finish(out, bias, plan.activation, out_ref.dtype)


def _correction(plan: _Plan, sums_ref, scales_ref, zeros_ref):
    """Sum over groups of scale zero sum(x), one small product instead of two operations an output and group."""
    offset = float(plan.extra) if zeros_ref is None else zeros_ref[...].astype(jnp.float32) + plan.extra
    right = scales_ref[...] * offset
    return sums_ref[...] * right if right.shape[0] == 1 else _product(sums_ref[...], right, 0)


def _dequantised(codes, extra: int, scales_ref, zeros_ref, group: int):
    """Float32 weights of a group, from codes that are `extra` too large."""
    offset = float(extra) if zeros_ref is None else zeros_ref[group : group + 1].astype(jnp.float32) + extra
    return (codes.astype(jnp.float32) - offset) * scales_ref[group : group + 1]


def _block_of_codes(plan: _Plan, codes_ref, rows: slice):
    if plan.bits != 4:
        return codes_ref[rows]
    codes = _widened(codes_ref[rows.start // 2 : rows.stop // 2], plan.integer)
    return codes.astype(jnp.float32) - FLOAT_OFFSET if plan.exact else codes


def _widened(data, integer: bool):
    """[K / 2, N] bytes -> [K, N] codes, 136 too large in bfloat16 or 8 in int8, in the order of `_in_order`."""
    words = pltpu.bitcast(data, jnp.int32)
    parts = []
    for start in range(0, words.shape[0], 8):
        unit = words[start : start + 8]
        if integer:
            parts += [pltpu.bitcast((_right(unit, at) & 0x0F0F0F0F) ^ 0x08080808, jnp.int8) for at in (0, 4)]
        else:
            bits = BF16_128 | 0x00080008
            parts += [pltpu.bitcast((_right(unit, at) & 0x000F000F) ^ bits, jnp.bfloat16) for at in (0, 4, 8, 12)]
    return jnp.concatenate(parts, axis=0)


def _right(words, by: int):
    return words >> by if by else words


def _product(x, codes, axis: int):
    """x codes, in int32 of int8 and in float32 of floats; float32 x keeps its precision."""
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    numbers = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, codes.astype(x.dtype), numbers, precision=precision, preferred_element_type=dtype)


def input_gradient(g: Array, w: QuantizedTensor, dtype: Any) -> Array:
    """g w^T of g [M, N]; each block of weights is dequantised in VMEM, in g's dtype."""
    block = _pick("input_gradient", g, w)
    num_outputs, ratio = w.data.shape[1], 2 if w.bits == 4 else 1
    grouped, num_k = w.group_size is not None, w.padded_size // block.k
    per_step = block.k // w.group_size if w.group_size is not None else 1

    def by_group(values):
        shape = (num_k if grouped else 1, per_step, num_outputs)
        spec = pl.BlockSpec((None, per_step, block.n), lambda m, k, n: (k if grouped else 0, 0, n))
        return values.reshape(shape), spec

    operands = [
        (g, pl.BlockSpec((block.m, block.n), lambda m, k, n: (m, n))),
        (w.data, pl.BlockSpec((block.k // ratio, block.n), lambda m, k, n: (k, n))),
        by_group(w.scales),
    ]
    if w.zeros is not None:
        operands.append(by_group(w.zeros))
    out = pl.pallas_call(
        functools.partial(_gradient_kernel, block, w.bits, num_outputs, w.zeros is not None),
        grid=(-(-g.shape[0] // block.m), num_k, -(-num_outputs // block.n)),
        in_specs=[spec for _, spec in operands],
        out_specs=pl.BlockSpec((block.m, block.k), lambda m, k, n: (m, k)),
        out_shape=jax.ShapeDtypeStruct((g.shape[0], w.padded_size), dtype),
        scratch_shapes=[pltpu.VMEM((block.m, block.k), jnp.float32)],
        compiler_params=_compiler_params(),
        interpret=_interpret(),
        name="quantized_matmul_input_gradient",
    )(*(value for value, _ in operands))
    return (_out_of_order(out) if w.bits == 4 else out)[:, : w.size]


def _gradient_kernel(block: Blocks, bits, num_outputs: int, has_zeros: bool, g_ref, codes_ref, scales_ref, *refs):
    zeros_ref = refs[0] if has_zeros else None
    out_ref, acc_ref = refs[has_zeros:]
    n, num_n = pl.program_id(2), -(-num_outputs // block.n)

    @pl.when(n == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    g = g_ref[...]
    left = num_outputs - n * block.n  # outputs from here on: past them memory holds anything
    if num_outputs % block.n:
        g = jnp.where(lax.broadcasted_iota(jnp.int32, g.shape, 1) < left, g, jnp.zeros_like(g))
    num_groups = scales_ref.shape[0]
    size = block.k // num_groups
    for group in range(num_groups):
        rows = slice(group * size, (group + 1) * size)
        codes = _widened(codes_ref[rows.start // 2 : rows.stop // 2], False) if bits == 4 else codes_ref[rows]
        weights = _dequantised(codes, FLOAT_OFFSET if bits == 4 else 0, scales_ref, zeros_ref, group)
        if num_outputs % block.n:
            weights = jnp.where(lax.broadcasted_iota(jnp.int32, weights.shape, 1) < left, weights, 0.0)
        acc_ref[:, rows] += _product(g, weights, 1)

    @pl.when(n == num_n - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)
