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
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.chunked import Options, Softmax

DTYPES = (jnp.bfloat16, jnp.float16)
FEATURES = 64  # of a step
CHUNK_ROWS = 256  # that a chunk's tokens are a multiple of


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
    return _loss(options, x, w, chunked.labels_here(options, w, labels), weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    return _statistics(options, x, w, labels, exponentials=False).softmax.sums(options, weights)


def _loss_and_gradients(options: Options, x, w, labels, weights):
    tokens, vocab = x.shape[0], options.vocab(w)
    key = {"D": x.shape[1], "V": vocab, "M": tokens, "dtype": x.dtype.name}
    most = blocks.pick("linear_cross_entropy.chunk", key, CHUNKS).elements // vocab
    size = chunked.even(tokens, most, CHUNK_ROWS)
    return chunked.loss_and_gradients(size, functools.partial(_of_chunk, options), x, w, labels, weights)


_loss.defvjp(_loss_and_gradients, chunked.backward)


class _Rows(NamedTuple):
    """What is known of each token, and of its exponentials."""

    softmax: Softmax
    top: Array  # float32 [blocks of the vocabulary, M], what the exponentials are relative to, in units of log 2
    exponentials: Array | None  # [M, V]
    columns: int  # of a block


def _statistics(options: Options, x, w, labels, exponentials: bool) -> _Rows:
    from pallas_kernels.attention.gpu_tiles import LOG2E
    from pallas_kernels.linear_cross_entropy import gpu_logits

    tokens, vocab = x.shape[0], options.vocab(w)
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
    softmax = Softmax((top + jnp.log2(total)) / LOG2E, jnp.sum(picked, axis=0)).joined(options)
    written = None if got.exponentials is None else got.exponentials[:tokens, :vocab]
    return _Rows(softmax, block_top, written, block.columns)


def _of_chunk(options: Options, x, w, labels, weights, so_far):
    rows = _statistics(options, x, w, labels, exponentials=True)
    d_logits = _d_logits(options, rows, labels, weights).astype(x.dtype)
    dx = _dot(d_logits, w, 1, 0 if options.transposed else 1)
    dw = _dot(d_logits, x, 0, 0) if options.transposed else _dot(x, d_logits, 0, 0)
    return rows.softmax.sums(options, weights), dx.astype(x.dtype), dw if so_far is None else so_far + dw


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """a b in float32, summed over an axis of each."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _d_logits(options: Options, rows: _Rows, labels, weights) -> Array:
    from pallas_kernels.attention.gpu_tiles import LOG2E

    assert rows.exponentials is not None
    tokens, vocab = rows.exponentials.shape
    of_softmax, of_label = rows.softmax.gradient(options, weights)
    factor = jnp.exp2(rows.top - rows.softmax.lse * LOG2E) * of_softmax
    factor = jnp.broadcast_to(factor.T[:, :, None], (tokens, len(factor), rows.columns))
    softmax = rows.exponentials * factor.reshape(tokens, -1)[:, :vocab]
    is_label = labels[:, None] == jnp.arange(vocab, dtype=jnp.int32)
    return jnp.where(is_label, of_label[:, None], softmax)
