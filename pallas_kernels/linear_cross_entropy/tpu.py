"""The fused projection and loss on a TPU: blocks of the vocabulary pass by a block of rows; no logits reach HBM.

The forward kernel leaves each row's log-sum-exp and the logit of its label. Two backward kernels compute the logits
again, one adding up dx over the vocabulary, one dw over the rows (the scheme of arXiv:2411.09009): five products in
all where plain XLA needs three, but nothing of [M, V] and no partial sums of w's size are ever written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch

INTERPRET: Any = True  # how a kernel is interpreted where there is no TPU
DTYPES = (jnp.bfloat16, jnp.float32)
NEG_INF = -1e30  # not -inf: differences of two must not be nan
LANES, ALIGNMENT = 128, 16  # of a vector register; rows of a tile of bfloat16
VMEM_UNKNOWN = 64 * 2**20  # of an interpreted chip
VMEM_SHARE = 0.75  # of it for blocks; the rest is the compiler's


class Options(NamedTuple):
    """What is known when the kernels are compiled."""

    transposed: bool
    z_loss: float
    softcap: float | None
    vocab_axis: str | None


class Blocks(NamedTuple):
    """Rows loaded, rows whose logits are held at a time, and vocabulary loaded."""

    rows: int
    chunk: int
    vocab: int


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    x, w = arguments["x"], arguments["w"]
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"multiplies bfloat16 and float32, both alike, not {x.dtype} and {w.dtype}"
    if not candidates("dw", x.shape[0], x.shape[1], w.size // x.shape[1], x.dtype):
        return f"has no blocks for D={x.shape[1]} that fit the chip's VMEM"
    return None


def linear_cross_entropy(x, w, labels, weights, *, transposed, z_loss, softcap, vocab_axis):
    """See `api.linear_cross_entropy`."""
    options = Options(transposed, z_loss, softcap, vocab_axis)
    if vocab_axis is not None:
        vocab = w.shape[0 if transposed else 1]
        labels = labels - lax.axis_index(vocab_axis) * vocab
        labels = jnp.where(labels < vocab, labels, -1)  # nor may it be in the padding of the last block
    return _loss(options, x, w, labels.astype(jnp.int32), weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    return _forward(options, x, w, labels, weights)[0]


def _forward(options: Options, x, w, labels, weights):
    lse, label_logit = statistics(options, x, w, labels)
    if options.vocab_axis is not None:
        top = lax.pmax(lse, options.vocab_axis)
        total, label_logit = lax.psum((jnp.exp(lse - top), label_logit), options.vocab_axis)
        lse = top + jnp.log(total)
    nll = lse - label_logit
    loss = jnp.sum(weights * (nll + options.z_loss * lse**2))
    return (loss, jnp.sum(weights * nll)), (x, w, labels, weights, lse)


def _backward(options: Options, residuals, cotangents):
    x, w, labels, weights, lse = residuals
    scale = cotangents[0]
    if options.vocab_axis is not None:
        # Every device of the vocabulary axis returns the same loss and holds a share of its cotangent; dx is this
        # device's part of the sum over the vocabulary, which shard_map adds up as x is the same on all of them.
        scale = lax.psum(scale, options.vocab_axis)
    dx = gradient_of_x(options, x, w, labels, weights * scale, lse)
    return dx, gradient_of_w(options, x, w, labels, weights * scale, lse), None, None


_loss.defvjp(_forward, _backward)


# Forward: log-sum-exp and label's logit of each row.


def statistics(options: Options, x, w, labels) -> tuple[Array, Array]:
    """(log-sum-exp over the vocabulary here, logit of the label or 0 where it is not here), float32 [M]."""
    shape = _Shape.of(options, x, w, _pick("forward", options, x, w))
    column = jax.ShapeDtypeStruct((shape.padded_rows, 1), jnp.float32)
    lse, label_logit = _call(
        functools.partial(_forward_kernel, options, shape),
        "linear_cross_entropy",
        shape,
        (shape.num_rows, shape.num_vocab),
        [shape.x(0), shape.w(1), shape.column(0)],
        [shape.column(0), shape.column(0)],
        [column, column],
        [pltpu.VMEM((shape.block.rows, LANES), jnp.float32) for _ in range(3)],
        products=1,
    )(shape.pad(x), w, shape.pad(labels)[:, None])
    return lse[: x.shape[0], 0], label_logit[: x.shape[0], 0]


def _forward_kernel(options: Options, shape: "_Shape", x, w, labels, lse, label_logit, top, total, picked):
    """Each lane keeps the maximum and sum of its own part of the vocabulary; they are joined at the end."""
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _begin():
        top[...] = jnp.full_like(top, NEG_INF)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)

    def chunk(here):
        logits, _, index = _logits(options, shape, v, x[here], w[...])
        parts = [logits[:, at : at + LANES] for at in range(0, shape.block.vocab, LANES)]
        label = labels[here]
        old = top[here]
        new = functools.reduce(jnp.maximum, parts, old)
        total[here] = total[here] * jnp.exp(old - new) + sum(jnp.exp(part - new) for part in parts)
        top[here] = new
        found = jnp.where(index == label, logits, 0.0)
        picked[here] += sum(found[:, at : at + LANES] for at in range(0, shape.block.vocab, LANES))

    _for_chunks(shape.block, chunk)

    @pl.when(v == shape.num_vocab - 1)
    def _end():
        row_top = jnp.max(top[...], axis=1, keepdims=True)
        row_total = jnp.sum(total[...] * jnp.exp(top[...] - row_top), axis=1, keepdims=True)
        lse[...] = row_top + jnp.log(row_total)
        label_logit[...] = jnp.sum(picked[...], axis=1, keepdims=True)


# Backward: d_logits = weight * (softmax * (1 + 2 z lse) - [label]) * softcap's slope, a block at a time.


def gradient_of_x(options: Options, x, w, labels, weights, lse) -> Array:
    """d_logits wᵀ, this device's part of the vocabulary; weights [M] have the loss's cotangent in them."""
    shape = _Shape.of(options, x, w, _pick("dx", options, x, w))
    dx = _call(
        functools.partial(_dx_kernel, options, shape),
        "linear_cross_entropy_dx",
        shape,
        (shape.num_rows, shape.num_vocab),
        [shape.x(0), shape.w(1), *[shape.column(0)] * 3],
        shape.x(0),
        jax.ShapeDtypeStruct((shape.padded_rows, x.shape[1]), x.dtype),
        [pltpu.VMEM((shape.block.rows, x.shape[1]), jnp.float32)],
        products=2,
    )(shape.pad(x), w, *shape.columns(labels, weights, lse))
    return dx[: x.shape[0]]


def _dx_kernel(options: Options, shape: "_Shape", x, w, labels, weights, lse, dx, total):
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _begin():
        total[...] = jnp.zeros_like(total)

    def chunk(here):
        matrix = shape.without_tail(w[...], v)
        d_logits = _d_logits(options, shape, v, x[here], matrix, labels[here], weights[here], lse[here])
        total[here] += _dot(d_logits, matrix, ((1,), (0 if options.transposed else 1,)))

    _for_chunks(shape.block, chunk)

    @pl.when(v == shape.num_vocab - 1)
    def _end():
        dx[...] = total[...].astype(dx.dtype)


def gradient_of_w(options: Options, x, w, labels, weights, lse) -> Array:
    """xᵀ d_logits, or its transpose where w is transposed; see `gradient_of_x`."""
    shape = _Shape.of(options, x, w, _pick("dw", options, x, w))
    block = shape.block
    of_w = (block.vocab, x.shape[1]) if options.transposed else (x.shape[1], block.vocab)
    return _call(
        functools.partial(_dw_kernel, options, shape),
        "linear_cross_entropy_dw",
        shape,
        (shape.num_vocab, shape.num_rows),
        [shape.x(1), shape.w(0), *[shape.column(1)] * 3],
        shape.w(0),
        jax.ShapeDtypeStruct(w.shape, w.dtype),
        [pltpu.VMEM(of_w, jnp.float32), pltpu.VMEM((block.rows, block.vocab), x.dtype)],
        products=2,
    )(shape.pad(x), w, *shape.columns(labels, weights, lse))


def _dw_kernel(options: Options, shape: "_Shape", x, w, labels, weights, lse, dw, total, d_logits):
    v, rows = pl.program_id(0), pl.program_id(1)

    @pl.when(rows == 0)
    def _begin():
        total[...] = jnp.zeros_like(total)

    def chunk(here):
        d_logits[here] = _d_logits(options, shape, v, x[here], w[...], labels[here], weights[here], lse[here])

    _for_chunks(shape.block, chunk)
    # All rows are summed at once, so that the sums so far are read and written once; a few of w's rows at a time.
    left, right = (d_logits, x) if options.transposed else (x, d_logits)
    height = left.shape[1]
    step = LANES * 4 if height % (LANES * 4) == 0 else LANES if height % LANES == 0 else height

    def part(i, _):
        here = pl.ds(pl.multiple_of(i * step, step), step)
        total[here] += _dot(left[:, here], right[...], ((0,), (0,)))

    lax.fori_loop(0, height // step, part, None)

    @pl.when(rows == shape.num_rows - 1)
    def _end():
        dw[...] = total[...].astype(dw.dtype)


def _logits(options: Options, shape: "_Shape", v, x, w) -> tuple[Array, Array | float, Array]:
    """Capped logits of vocabulary block v in float32, the softcap's slope, and each one's place in the vocabulary."""
    logits = _dot(x, w, ((1,), (1 if options.transposed else 0,)))
    slope: Array | float = 1.0
    if options.softcap is not None:
        squashed = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * squashed, 1.0 - squashed**2
    index = v * shape.block.vocab + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if shape.has_tail:
        logits = jnp.where(index < shape.vocab, logits, NEG_INF)
    return logits, slope, index


def _d_logits(options: Options, shape: "_Shape", v, x, w, labels, weights, lse) -> Array:
    logits, slope, index = _logits(options, shape, v, x, w)
    d = jnp.exp(logits - lse) * (weights * (1.0 + 2.0 * options.z_loss * lse))
    d = (d - jnp.where(index == labels, weights, 0.0)) * slope
    if shape.has_tail and options.softcap is not None:
        d = jnp.where(index < shape.vocab, d, 0.0)  # a slope of what was never written may be nan
    return d.astype(x.dtype)


def _for_chunks(block: Blocks, body) -> None:
    def step(i, _):
        body(pl.ds(pl.multiple_of(i * block.chunk, block.chunk), block.chunk))

    lax.fori_loop(0, block.rows // block.chunk, step, None)


def _dot(a, b, contract) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


# Blocks and calls.


class _Shape(NamedTuple):
    """The sizes of a call, and its blocks; an argument `axis` is the grid's that walks the rows or the vocabulary."""

    block: Blocks
    rows: int
    features: int
    vocab: int
    transposed: bool

    @classmethod
    def of(cls, options: Options, x, w, block: Blocks) -> "_Shape":
        rows, features = x.shape
        return cls(block, rows, features, w.shape[0 if options.transposed else 1], options.transposed)

    @property
    def num_rows(self) -> int:
        return pl.cdiv(self.rows, self.block.rows)

    @property
    def padded_rows(self) -> int:
        return self.num_rows * self.block.rows

    @property
    def num_vocab(self) -> int:
        return pl.cdiv(self.vocab, self.block.vocab)

    @property
    def has_tail(self) -> bool:
        return self.vocab % self.block.vocab > 0

    def x(self, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.block.rows, self.features), lambda *grid: (grid[axis], 0))

    def w(self, axis: int) -> pl.BlockSpec:
        if self.transposed:
            return pl.BlockSpec((self.block.vocab, self.features), lambda *grid: (grid[axis], 0))
        return pl.BlockSpec((self.features, self.block.vocab), lambda *grid: (0, grid[axis]))

    def column(self, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((self.block.rows, 1), lambda *grid: (grid[axis], 0))

    def pad(self, a: Array) -> Array:
        """Rows of zeros up to whole blocks."""
        return jnp.pad(a, [(0, self.padded_rows - self.rows)] + [(0, 0)] * (a.ndim - 1))

    def columns(self, *arrays: Array) -> list[Array]:
        return [self.pad(a)[:, None] for a in arrays]

    def without_tail(self, w: Array, v) -> Array:
        """Block v of w, zeros where there is no vocabulary any more: zero times what lies there may be nan."""
        if not self.has_tail:
            return w
        index = v * self.block.vocab + lax.broadcasted_iota(jnp.int32, w.shape, 0 if self.transposed else 1)
        return jnp.where(index < self.vocab, w.astype(jnp.float32), 0.0).astype(w.dtype)


def _call(kernel, name, shape: _Shape, grid, in_specs, out_specs, out_shape, scratch_shapes, products):
    flops = 2 * shape.rows * shape.features * shape.vocab * products
    moved = shape.rows * shape.features + shape.num_rows * shape.features * shape.vocab
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=2 * moved, transcendentals=shape.rows * shape.vocab),
        interpret=INTERPRET if dispatch.interpreted() else False,
        name=name,
    )


def _pick(direction: str, options: Options, x, w) -> Blocks:
    (rows, features), vocab = x.shape, w.shape[0 if options.transposed else 1]
    key = {"D": features, "V": vocab, "M": rows, "dtype": x.dtype.name, "transposed": options.transposed}
    return blocks.pick(f"linear_cross_entropy.{direction}", key, candidates(direction, rows, features, vocab, x.dtype))


def candidates(direction: str, rows: int, features: int, vocab: int, dtype) -> list[Blocks]:
    """Blocks that fit the VMEM, fewest bytes from HBM first: w is read once a block of rows, or x once one of w."""
    size = jnp.dtype(dtype).itemsize
    found: dict[Blocks, tuple[float, int]] = {}
    for height in sorted({min(height, _up(rows, ALIGNMENT)) for height in (1024, 512, 256, 128)}):
        for width in sorted({min(width, _up(vocab, LANES)) for width in (2048, 1024, 512, 256, 128)}):
            chunk = 256 if height % 256 == 0 else height
            of_x, of_w = height * features, width * features
            used = 2 * (of_x + of_w) * size + 3 * chunk * width * 4
            if direction == "dx":
                used += of_x * (4 + 2 * size) + chunk * features * 4
            elif direction == "dw":
                used += of_w * (4 + 2 * size) + height * width * size
            if used <= _vmem_limit() * VMEM_SHARE:
                reads = pl.cdiv(vocab, width) * rows if direction == "dw" else pl.cdiv(rows, height) * vocab
                found[Blocks(height, chunk, width)] = reads, -height * width
    return sorted(found, key=found.__getitem__)


def _vmem_limit() -> int:
    if dispatch.interpreted():
        return VMEM_UNKNOWN
    return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
