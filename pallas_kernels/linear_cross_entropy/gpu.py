"""The fused projection and loss on Hopper GPUs: one kernel over tiles of logits (`gpu_logits`), merged by XLA.

For the loss alone no logits reach memory. Gradients are taken in the same pass, for chunks of tokens: the kernel writes
a chunk's exponentials in half precision, XLA makes the logits' gradients of them when their sums are known, and cuBLAS
multiplies those: three products in all, and a chunk of [tokens, V] is the most that is ever held.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import blocks, dispatch, hopper
from pallas_kernels.linear_cross_entropy import xla

DTYPES = (jnp.bfloat16, jnp.float16)
FEATURES = 64  # of a step


class Options(NamedTuple):
    """What is known when the kernel is compiled."""

    transposed: bool
    z_loss: float
    softcap: float | None
    vocab_axis: str | None


class Chunk(NamedTuple):
    """Elements of [tokens, V] that are held at once, where gradients are wanted."""

    elements: int


# Half of 512 MiB holds exponentials, the other their gradients, unless XLA writes one over the other. In small chunks
# cuBLAS reads and writes the float32 sums of w's gradient more often.
CHUNKS = (Chunk(2**27), Chunk(2**26), Chunk(2**28), Chunk(2**25))


def refuse(chip: dispatch.Chip, arguments: dispatch.Arguments) -> str | None:
    """Why the kernel does not take a call, or None."""
    x, w = arguments["x"], arguments["w"]
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"multiplies bfloat16 and float16, both alike, not {x.dtype} and {w.dtype}"
    if 0 in (*x.shape, *w.shape):
        return f"x {x.shape} or w {w.shape} is empty"
    if x.shape[1] % FEATURES:
        return f"D={x.shape[1]} is not a multiple of {FEATURES}, the features of a step"
    return hopper.refuse(chip)


def linear_cross_entropy(x, w, labels, weights, *, transposed, z_loss, softcap, vocab_axis):
    """See `api.linear_cross_entropy`."""
    options = Options(transposed, z_loss, softcap, vocab_axis)
    labels, vocab = labels.astype(jnp.int32), w.shape[0 if transposed else 1]
    if vocab_axis is not None:
        labels = labels - lax.axis_index(vocab_axis) * vocab
    labels = jnp.where(labels < vocab, labels, -1)  # nor may it be in the padding of the last block
    return _loss(options, x, w, labels, weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    rows = _statistics(options, x, w, labels, exponentials=False)
    return _sums(options, rows, weights)


def _forward(options: Options, x, w, labels, weights):
    """Loss and gradients, chunk by chunk."""
    tokens, vocab = x.shape[0], w.shape[0 if options.transposed else 1]
    key = {"D": x.shape[1], "V": vocab, "M": tokens, "dtype": x.dtype.name}
    size = _chunk(blocks.pick("linear_cross_entropy.chunk", key, CHUNKS), tokens, vocab)
    if size >= tokens:
        sums, dx, dw = _chunk_gradients(options, x, w, labels, weights)
        return sums, (dx, dw.astype(w.dtype))

    def split(a):
        a = jnp.pad(a, [(0, -tokens % size)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, size, *a.shape[1:])

    def add(total, chunk):
        part, dx, dw = _chunk_gradients(options, chunk[0], w, *chunk[1:])
        return (total[0] + part[0], total[1] + part[1], total[2] + dw), dx

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(w.shape, jnp.float32))
    (loss, nll, dw), dx = lax.scan(add, start, (split(x), split(labels), split(weights)))
    return (loss, nll), (dx.reshape(-1, x.shape[1])[:tokens], dw.astype(w.dtype))


_loss.defvjp(_forward, xla.backward)


def _chunk(chunk: Chunk, tokens: int, vocab: int) -> int:
    """Tokens at a time: as few equal chunks as may be, each of whole blocks of rows."""
    most = max(1, chunk.elements // vocab // 256) * 256
    if tokens <= most:
        return tokens
    even = -(-tokens // -(-tokens // most))
    return even + -even % 256


class _Rows(NamedTuple):
    """What is known of each token, float32 [M], and of its exponentials."""

    lse: Array
    label_logit: Array
    top: Array  # [blocks of the vocabulary, M], what the exponentials are relative to, in units of log 2
    exponentials: Array | None  # [M, V]
    columns: int  # of a block


def _statistics(options: Options, x, w, labels, exponentials: bool) -> _Rows:
    from pallas_kernels.attention.gpu_tiles import LOG2E
    from pallas_kernels.linear_cross_entropy import gpu_logits

    tokens, vocab = x.shape[0], w.shape[0 if options.transposed else 1]
    found = gpu_logits.candidates(tokens, x.dtype.itemsize, exponentials)
    key: dict[str, Any] = {"D": x.shape[1], "V": vocab, "M": tokens, "dtype": x.dtype.name}
    name = "linear_cross_entropy.exponentials" if exponentials else "linear_cross_entropy.forward"
    block = blocks.pick(name, key | {"transposed": options.transposed}, found)
    if dispatch.interpreted():
        block = block._replace(cluster=1)  # the interpreter has no copies for several thread blocks
    known = gpu_logits.Options(options.transposed, options.softcap, vocab, exponentials, dispatch.interpreted())
    pad, missing = (0, -tokens % block.rows), (0, -vocab % gpu_logits.alignment(known, block))
    w = jnp.pad(w, (missing, (0, 0)) if options.transposed else ((0, 0), missing))
    got = gpu_logits.statistics(known, block, jnp.pad(x, (pad, (0, 0))), w, jnp.pad(labels, pad, constant_values=-1))
    block_top, total, picked = (a[:, :tokens] for a in got[:3])
    top = jnp.max(block_top, axis=0)
    total = jnp.sum(total * jnp.exp2(block_top - top), axis=0)
    lse, label_logit = (top + jnp.log2(total)) / LOG2E, jnp.sum(picked, axis=0)
    if options.vocab_axis is not None:
        highest = lax.pmax(lse, options.vocab_axis)
        total, label_logit = lax.psum((jnp.exp(lse - highest), label_logit), options.vocab_axis)
        lse = highest + jnp.log(total)
    written = None if got.exponentials is None else got.exponentials[:tokens, :vocab]
    return _Rows(lse, label_logit, block_top, written, block.columns)


def _sums(options: Options, rows: _Rows, weights) -> tuple[Array, Array]:
    nll = rows.lse - rows.label_logit
    return jnp.sum(weights * (nll + options.z_loss * rows.lse**2)), jnp.sum(weights * nll)


def _chunk_gradients(options: Options, x, w, labels, weights):
    """((loss, nll), dx, dw) of some tokens; dw in float32."""
    rows = _statistics(options, x, w, labels, exponentials=True)
    d_logits = _d_logits(options, rows, labels, weights).astype(x.dtype)
    dx = _dot(d_logits, w, 1, 0 if options.transposed else 1)
    dw = _dot(d_logits, x, 0, 0) if options.transposed else _dot(x, d_logits, 0, 0)
    return _sums(options, rows, weights), dx.astype(x.dtype), dw


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """a b in float32, summed over an axis of each."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _d_logits(options: Options, rows: _Rows, labels, weights) -> Array:
    """weight * (softmax * (1 + 2 z lse) - [label]) * softcap's slope.

    The label's is computed from its logit: one less a softmax near one, in half precision, has few digits.
    """
    from pallas_kernels.attention.gpu_tiles import LOG2E

    assert rows.exponentials is not None
    tokens, vocab = rows.exponentials.shape
    of_softmax = weights * (1.0 + 2.0 * options.z_loss * rows.lse)
    of_label = of_softmax * jnp.exp(rows.label_logit - rows.lse) - weights
    if options.softcap is not None:
        of_label = of_label * (1.0 - (rows.label_logit / options.softcap) ** 2)
    factor = jnp.exp2(rows.top - rows.lse * LOG2E) * of_softmax
    factor = jnp.broadcast_to(factor.T[:, :, None], (tokens, len(factor), rows.columns))
    softmax = rows.exponentials * factor.reshape(tokens, -1)[:, :vocab]
    is_label = labels[:, None] == jnp.arange(vocab, dtype=jnp.int32)
    return jnp.where(is_label, of_label[:, None], softmax)
