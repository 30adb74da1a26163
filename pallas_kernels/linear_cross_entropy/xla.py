"""Fused projection and cross-entropy in plain XLA: a scan over chunks of tokens, gradients in the same pass."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cpu import product
from pallas_kernels.dispatch import current_chip
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.chunked import Options, Softmax

# Logits held at once: 64 MiB in float32 on a CPU. An accelerator reads and writes the sums of w's gradient for each chunk.
CPU_CHUNK, CHUNK = 2**24, 2**27


def linear_cross_entropy(x, w, labels, weights, *, transposed, z_loss, softcap, vocab_axis):
    """See `api.linear_cross_entropy`."""
    options = Options(transposed, z_loss, softcap, vocab_axis)
    return _loss(options, x, w, chunked.labels_here(options, w, labels), weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options: Options, x, w, labels, weights):
    def of_chunk(total, chunk):
        x, labels, weights = chunk
        sums = _softmax(options, _logits(options, x, w), labels).sums(options, weights)
        return (total[0] + sums[0], total[1] + sums[1]), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(of_chunk, (zero, zero), chunked.split(_size(options, x, w), x, labels, weights))[0]


def _loss_and_gradients(options: Options, x, w, labels, weights):
    of_chunk = functools.partial(_of_chunk, options)
    return chunked.loss_and_gradients(_size(options, x, w), of_chunk, x, w, labels, weights)


_loss.defvjp(_loss_and_gradients, chunked.backward)


def _size(options: Options, x, w) -> int:
    """Tokens of a chunk."""
    elements = CPU_CHUNK if current_chip().platform == "cpu" else CHUNK
    return chunked.even(x.shape[0], elements // options.vocab(w), 1)


def _of_chunk(options: Options, x, w, labels, weights, so_far):
    logits = _logits(options, x, w)
    softmax = _softmax(options, logits, labels)
    d_logits = _d_logits(options, softmax, logits, labels, weights).astype(x.dtype)
    dx = product(d_logits, w, b_transposed=not options.transposed)
    sides = (d_logits, x) if options.transposed else (x, d_logits)
    dw = product(*sides, a_transposed=True)
    return softmax.sums(options, weights), dx.astype(x.dtype), dw if so_far is None else so_far + dw


def _logits(options: Options, x, w) -> Array:
    logits = product(x, w, b_transposed=options.transposed)
    return logits if options.softcap is None else options.softcap * jnp.tanh(logits / options.softcap)


def _softmax(options: Options, logits: Array, labels: Array) -> Softmax:
    top = jnp.max(logits, axis=-1, keepdims=True)
    lse = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[:, 0]
    # A gather, not a sum under a mask: a CPU would write that mask's result out, all of [M, V].
    label_logit = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return Softmax(lse, jnp.where(labels >= 0, label_logit, 0.0)).joined(options)


def _d_logits(options: Options, softmax: Softmax, logits: Array, labels: Array, weights: Array) -> Array:
    of_softmax, of_label = softmax.gradient(options, weights)
    d = jnp.exp(logits - softmax.lse[:, None]) * of_softmax[:, None]
    if options.softcap is not None:
        d = d * (1.0 - (logits / options.softcap) ** 2)
    return jnp.where(labels[:, None] == jnp.arange(logits.shape[1]), of_label[:, None], d)
