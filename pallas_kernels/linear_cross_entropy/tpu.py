"""The fused projection and loss on a TPU: blocks of the vocabulary pass by a block of rows.

For the loss alone no logits reach HBM. Gradients are taken in the same pass, for chunks of tokens: the forward kernel
writes a chunk's exponentials in x's type, the kernel of dx turns them into the logits' gradients where they lie, and
that of dw reads those: three products in all, and a chunk of [tokens, V] is the most that is ever held.

Exponentials are relative to a *reference* of their row, the largest logit of its first block of the vocabulary: a type
with eight bits of exponent loses nothing by that, as long as no logit lies far above it. Where one does, by more than
REACH, the row has a new reference from that block on. The last two are kept, each with the column it begins at: what is
older than both lies more than REACH below the last, and its share of the softmax is nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import blocks, dispatch
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.chunked import Options, Softmax

INTERPRET: Any = True  # how a kernel is interpreted where there is no TPU
DTYPES = (jnp.bfloat16, jnp.float32)
NEG_INF = -1e30  # not -inf: differences of two must not be nan
REACH = 64.0  # e ** REACH times any vocabulary is still a float32
LANES, ALIGNMENT = 128, 16  # of a vector register; rows of a tile of bfloat16
VMEM_UNKNOWN = 64 * 2**20  # of an interpreted chip
VMEM_SHARE = 0.75  # of it for blocks; the rest is the compiler's
# Of [tokens, V]: bytes held at once at most, also as a share of the chip's HBM, and rows that a chunk is a multiple of.
# The sums of dw pass between HBM and the core once a chunk; products hide that from some 2,000 rows on.
CHUNK_BYTES, CHUNK_SHARE, CHUNK_ROWS = 2**31, 1 / 16, 1024


class Blocks(NamedTuple):
    """Rows loaded, rows whose logits are held at a time, and vocabulary loaded."""

    rows: int
    chunk: int
    vocab: int


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    x, w = arguments["x"], arguments["w"]
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"multiplies bfloat16 and float32, both alike, not {x.dtype} and {w.dtype}"
    sizes = x.shape[0], x.shape[1], w.size // x.shape[1]
    if not all(candidates(kernel, *sizes, x.dtype) for kernel in ("exponentials", "dx", "dw")):
        return f"has no blocks for D={x.shape[1]} that fit the chip's VMEM"
    return None


def linear_cross_entropy(x, w, labels, weights, *, transposed, z_loss, softcap, vocab_axis):
    """See `api.linear_cross_entropy`."""
    options = Options(transposed, z_loss, softcap, vocab_axis)
    return _loss(options, x, w, chunked.labels_here(options, w, labels), weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    return _forward("forward", options, x, w, labels).softmax.joined(options).sums(options, weights)


def _loss_and_gradients(options: Options, x, w, labels, weights):
    size = chunked.even(x.shape[0], _chunk_bytes() // (options.vocab(w) * x.dtype.itemsize), CHUNK_ROWS)
    return chunked.loss_and_gradients(size, functools.partial(_of_chunk, options), x, w, labels, weights)


_loss.defvjp(_loss_and_gradients, chunked.backward)


def _of_chunk(options: Options, x, w, labels, weights, so_far):
    rows = _forward("exponentials", options, x, w, labels)
    softmax = rows.softmax.joined(options)
    d_logits, dx = _gradient_of_x(options, rows, softmax, x, w, labels, weights)
    return softmax.sums(options, weights), dx, _gradient_of_w(options, d_logits, x, w, so_far)


# Forward: the softmax of each row, and its exponentials.


class _Rows(NamedTuple):
    """What the forward kernel leaves."""

    softmax: Softmax
    # Float32 [padded rows, 4]: the reference, the column of the vocabulary that it begins at, and both of the one before.
    references: Array
    exponentials: Array | None  # [padded rows, V], with the softcap's slope in them
    columns: int  # of a block; references begin at multiples of it


def _forward(kernel: str, options: Options, x, w, labels) -> _Rows:
    shape = _Shape.of(options, x, w, _pick(kernel, options, x, w))
    written = kernel == "exponentials"
    softmax, references, *exponentials = _call(
        functools.partial(_forward_kernel, options, shape),
        "linear_cross_entropy",
        shape,
        int(written),
        [shape.x, shape.w, shape.columns(1)],
        [shape.columns(2), shape.columns(4), *[shape.logits] * written],
        [
            *[jax.ShapeDtypeStruct((shape.padded_rows, width), jnp.float32) for width in (2, 4)],
            *[jax.ShapeDtypeStruct((shape.padded_rows, shape.vocab), x.dtype)] * written,
        ],
        [pltpu.VMEM((shape.block.rows, LANES), jnp.float32) for _ in range(2)],
    )(shape.pad(x), w, shape.pad(labels)[:, None])
    lse, label_logit = softmax[: x.shape[0]].T
    return _Rows(Softmax(lse, label_logit), references, exponentials[0] if written else None, shape.block.vocab)


def _forward_kernel(options: Options, shape: "_Shape", x, w, labels, softmax, references, *refs):
    """Each lane sums its own part of the vocabulary; they are joined at the end."""
    *exponentials, total, picked = refs
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _begin():
        references[...] = jnp.full_like(references, NEG_INF)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)

    def chunk(here):
        logits, slope, index = _logits(options, shape, v, x[here], w[...])
        top = jnp.max(functools.reduce(jnp.maximum, _lanes(logits)), axis=1, keepdims=True)
        old, start, earlier, earlier_start = _apart(references[here])
        moves = top > old + REACH  # always in the first block
        new, first = jnp.where(moves, top, old), (v * shape.block.vocab).astype(jnp.float32)
        references[here] = _side_by_side(
            new,
            jnp.where(moves, first, start),
            jnp.where(moves, old, earlier),
            jnp.where(moves, start, earlier_start),
        )
        exponential = jnp.exp(logits - new)
        for written in exponentials:
            written[here] = (exponential * slope).astype(written.dtype)
        total[here] = total[here] * jnp.exp(old - new) + sum(_lanes(exponential))
        picked[here] += sum(_lanes(jnp.where(index == labels[here], logits, 0.0)))

    _for_chunks(shape.block, chunk)

    @pl.when(v == shape.num_vocab - 1)
    def _end():
        lse = references[:, :1] + jnp.log(jnp.sum(total[...], axis=1, keepdims=True))
        softmax[...] = _side_by_side(lse, jnp.sum(picked[...], axis=1, keepdims=True))


def _logits(options: Options, shape: "_Shape", v, x, w) -> tuple[Array, Array | float, Array]:
    """Capped logits of vocabulary block v in float32, the softcap's slope, and each one's place in the vocabulary."""
    logits = _dot(x, w, ((1,), (1 if options.transposed else 0,)))
    slope: Array | float = 1.0
    if options.softcap is not None:
        squashed = jnp.tanh(logits / options.softcap)
        logits, slope = options.softcap * squashed, 1.0 - squashed**2
    index = shape.places(v, logits.shape)
    if shape.has_tail:
        logits = jnp.where(index < shape.vocab, logits, NEG_INF)
    return logits, slope, index


def _lanes(a: Array) -> list[Array]:
    return [a[:, at : at + LANES] for at in range(0, a.shape[1], LANES)]


def _apart(a: Array) -> list[Array]:
    return [a[:, at : at + 1] for at in range(a.shape[1])]


def _side_by_side(*columns: Array) -> Array:
    """[rows, 1] each, as [rows, len(columns)]."""
    shape = columns[0].shape[0], len(columns)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    joined = jnp.broadcast_to(columns[-1], shape)
    for i, column in enumerate(columns[:-1]):
        joined = jnp.where(lane == i, column, joined)
    return joined


# Backward: the logits' gradients in place of the exponentials, and what follows from them.


def _gradient_of_x(options: Options, rows: _Rows, softmax: Softmax, x, w, labels, weights) -> tuple[Array, Array]:
    """(gradients of the logits here [padded rows, V], of x [M, D]); weights float32."""
    assert rows.exponentials is not None
    shape = _Shape.of(options, x, w, _pick("dx", options, x, w, lambda block: rows.columns % block.vocab == 0))
    of_softmax, of_label = softmax.gradient(options, weights)
    reference, start, earlier, earlier_start = rows.references[: x.shape[0]].T
    factor, earlier_factor = (jnp.exp(one - softmax.lse) * of_softmax for one in (reference, earlier))
    # Columns of a vocabulary are exact in float32: it has less than 2**24.
    facts = (labels.astype(jnp.float32), of_label, factor, start, earlier_factor, earlier_start)
    d_logits, dx = _call(
        functools.partial(_dx_kernel, options, shape),
        "linear_cross_entropy_dx",
        shape,
        2,
        [shape.logits, shape.w, shape.columns(len(facts))],
        [shape.logits, shape.x],
        [
            jax.ShapeDtypeStruct(rows.exponentials.shape, x.dtype),
            jax.ShapeDtypeStruct((shape.padded_rows, x.shape[1]), x.dtype),
        ],
        [pltpu.VMEM((shape.block.rows, x.shape[1]), jnp.float32)],
        {0: 0},
    )(rows.exponentials, w, shape.pad(jnp.stack(facts, axis=1)))
    return d_logits, dx[: x.shape[0]]


def _dx_kernel(options: Options, shape: "_Shape", exponentials, w, facts, d_logits, dx, total):
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _begin():
        total[...] = jnp.zeros_like(total)

    def chunk(here):
        label, of_label, factor, start, earlier_factor, earlier_start = _apart(facts[here])
        first = (v * shape.block.vocab).astype(jnp.float32)
        earlier_factor = jnp.where(first >= earlier_start, earlier_factor, 0.0)
        factor = jnp.where(first >= start, factor, earlier_factor)
        gradient = exponentials[here].astype(jnp.float32) * factor
        index = shape.places(v, gradient.shape)
        gradient = jnp.where(index == label.astype(jnp.int32), of_label, gradient)
        if shape.has_tail:
            gradient = jnp.where(index < shape.vocab, gradient, 0.0)  # what lies there was never written
        d_logits[here] = gradient.astype(d_logits.dtype)
        matrix = shape.without_tail(w[...], v)
        total[here] += _dot(d_logits[here], matrix, ((1,), (0 if options.transposed else 1,)))

    _for_chunks(shape.block, chunk)

    @pl.when(v == shape.num_vocab - 1)
    def _end():
        dx[...] = total[...].astype(dx.dtype)


def _gradient_of_w(options: Options, d_logits, x, w, so_far) -> Array:
    """xᵀ d_logits, or its transpose where w is transposed, in w's type; or added to `so_far`, in float32."""
    height = d_logits.shape[0]
    x = jnp.pad(x, [(0, height - x.shape[0]), (0, 0)])
    block = _pick("dw", options, x, w, lambda block: height % block.rows == 0)
    shape = _Shape.of(options, x, w, block, vocab_first=True)
    adds = so_far is not None
    return _call(
        functools.partial(_dw_kernel, options, adds),
        "linear_cross_entropy_dw",
        shape,
        1,
        [shape.x, shape.logits, *[shape.w] * adds],
        [shape.w],
        [jax.ShapeDtypeStruct(w.shape, jnp.float32 if adds else w.dtype)],
        [] if adds else [pltpu.VMEM(shape.of_w, jnp.float32)],
        {2: 0} if adds else {},
    )(x, d_logits, *[so_far] * adds)[0]


def _dw_kernel(options: Options, adds: bool, x, d_logits, *refs):
    so_far, dw, total = (refs[0], refs[1], refs[1]) if adds else (None, *refs)
    rows = pl.program_id(1)

    @pl.when(rows == 0)
    def _begin():
        total[...] = jnp.zeros_like(total) if so_far is None else so_far[...]

    # A few of the sums' rows at a time.
    left, right = (d_logits, x) if options.transposed else (x, d_logits)
    height = left.shape[1]
    step = LANES * 4 if height % (LANES * 4) == 0 else LANES if height % LANES == 0 else height

    def part(i, _):
        here = pl.ds(pl.multiple_of(i * step, step), step)
        total[here] += _dot(left[:, here], right[...], ((0,), (0,)))

    lax.fori_loop(0, height // step, part, None)

    if not adds:

        @pl.when(rows == pl.num_programs(1) - 1)
        def _end():
            dw[...] = total[...].astype(dw.dtype)


def _for_chunks(block: Blocks, body) -> None:
    def step(i, _):
        body(pl.ds(pl.multiple_of(i * block.chunk, block.chunk), block.chunk))

    lax.fori_loop(0, block.rows // block.chunk, step, None)


def _dot(a, b, contract) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


# Blocks and calls.


class _Shape(NamedTuple):
    """The sizes of a call, and its blocks. The grid is (blocks of rows, blocks of the vocabulary), or the other way."""

    block: Blocks
    rows: int
    features: int
    vocab: int
    transposed: bool
    vocab_first: bool

    @classmethod
    def of(cls, options: Options, x, w, block: Blocks, vocab_first: bool = False) -> "_Shape":
        rows, features = x.shape
        return cls(block, rows, features, options.vocab(w), options.transposed, vocab_first)

    @property
    def padded_rows(self) -> int:
        return pl.cdiv(self.rows, self.block.rows) * self.block.rows

    @property
    def num_vocab(self) -> int:
        return pl.cdiv(self.vocab, self.block.vocab)

    @property
    def grid(self) -> tuple[int, int]:
        grid = self.padded_rows // self.block.rows, self.num_vocab
        return grid[::-1] if self.vocab_first else grid

    @property
    def has_tail(self) -> bool:
        return self.vocab % self.block.vocab > 0

    @property
    def x(self) -> pl.BlockSpec:
        return self.columns(self.features)

    @property
    def of_w(self) -> tuple[int, int]:
        """The shape of a block of w."""
        return (self.block.vocab, self.features) if self.transposed else (self.features, self.block.vocab)

    @property
    def w(self) -> pl.BlockSpec:
        return self._spec(self.of_w, lambda rows, v: (v, 0) if self.transposed else (0, v))

    @property
    def logits(self) -> pl.BlockSpec:
        return self._spec((self.block.rows, self.block.vocab), lambda rows, v: (rows, v))

    def columns(self, width: int) -> pl.BlockSpec:
        return self._spec((self.block.rows, width), lambda rows, v: (rows, 0))

    def _spec(self, shape: tuple[int, int], place: Callable[[Any, Any], tuple[Any, Any]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, (lambda v, rows: place(rows, v)) if self.vocab_first else place)

    def bytes_moved(self, passes: int, size: int) -> int:
        """From and to HBM: what does not change along the grid's second axis is read once, the other side each time."""
        of_x, of_w = self.rows * self.features, self.features * self.vocab
        read = (of_w, of_x) if self.vocab_first else (of_x, of_w)
        return size * (read[0] + self.grid[0] * read[1] + passes * self.rows * self.vocab)

    def pad(self, a: Array) -> Array:
        """Rows of zeros up to whole blocks."""
        return jnp.pad(a, [(0, self.padded_rows - self.rows)] + [(0, 0)] * (a.ndim - 1))

    def places(self, v, shape: tuple[int, ...], axis: int = 1) -> Array:
        """Places in the vocabulary of block v's elements, which lie along an axis of `shape`."""
        return v * self.block.vocab + lax.broadcasted_iota(jnp.int32, shape, axis)

    def without_tail(self, w: Array, v) -> Array:
        """Block v of w, zeros where there is no vocabulary any more: zero times what lies there may be nan."""
        if not self.has_tail:
            return w
        index = self.places(v, w.shape, 0 if self.transposed else 1)
        return jnp.where(index < self.vocab, w.astype(jnp.float32), 0.0).astype(w.dtype)


def _call(kernel, name, shape: _Shape, passes, in_specs, out_specs, out_shape, scratch_shapes, aliases=None):
    """passes: how often [rows, V] is read or written."""
    return pl.pallas_call(
        kernel,
        grid=shape.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_vmem_limit()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * shape.rows * shape.features * shape.vocab,
            bytes_accessed=shape.bytes_moved(passes, out_shape[-1].dtype.itemsize),
            transcendentals=shape.rows * shape.vocab,
        ),
        interpret=INTERPRET if dispatch.interpreted() else False,
        name=name,
        # The interpreter of jax 0.10 leaves an aliased result padded to whole blocks.
        input_output_aliases={} if dispatch.interpreted() else aliases or {},
    )


def _pick(kernel: str, options: Options, x, w, fits: Callable[[Blocks], bool] = lambda block: True) -> Blocks:
    (rows, features), vocab = x.shape, options.vocab(w)
    key = {"D": features, "V": vocab, "M": rows, "dtype": x.dtype.name, "transposed": options.transposed}
    found = [block for block in candidates(kernel, rows, features, vocab, x.dtype) if fits(block)]
    return blocks.pick(f"linear_cross_entropy.{kernel}", key, found)


def candidates(kernel: str, rows: int, features: int, vocab: int, dtype) -> list[Blocks]:
    """Blocks of "forward", "exponentials", "dx" or "dw" that fit the VMEM, fewest bytes from HBM first."""
    size = jnp.dtype(dtype).itemsize
    found: dict[Blocks, tuple[int, int]] = {}
    for height in sorted({min(height, _up(rows, ALIGNMENT)) for height in (1024, 512, 256, 128)}):
        for width in sorted({min(width, _up(vocab, LANES)) for width in (2048, 1024, 512, 256, 128)}):
            chunk = 256 if height % 256 == 0 else height
            of_x, of_w, of_logits = height * features, width * features, height * width
            used = {
                "forward": 2 * (of_x + of_w) * size + 3 * chunk * width * 4,
                "exponentials": 2 * (of_x + of_w + of_logits) * size + 3 * chunk * width * 4,
                "dx": 2 * (of_x + of_w + 2 * of_logits) * size + of_x * 4 + chunk * (3 * width + features) * 4,
                "dw": 2 * (of_x + of_logits) * size + 4 * of_w * 4,
            }[kernel]
            if used <= _vmem_limit() * VMEM_SHARE:
                reads = pl.cdiv(vocab, width) if kernel == "dw" else pl.cdiv(rows, height)
                found[Blocks(height, chunk, width)] = reads, -height * width
    return sorted(found, key=found.__getitem__)


def _vmem_limit() -> int:
    if dispatch.interpreted():
        return VMEM_UNKNOWN
    return pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16


def _chunk_bytes() -> int:
    if dispatch.interpreted():
        return CHUNK_BYTES
    return min(CHUNK_BYTES, int(pltpu.get_tpu_info().hbm_capacity_bytes * CHUNK_SHARE))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
