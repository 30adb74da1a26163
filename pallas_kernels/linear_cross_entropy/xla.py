"""Fused projection and cross-entropy in plain XLA: a scan over chunks of tokens, gradients in the same pass."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cpu import product
from pallas_kernels.dispatch import current_chip

# Logits held at once: 64 MiB in float32 on a CPU. An accelerator reads and writes the sums of w's gradient for each chunk.
CPU_CHUNK, CHUNK = 2**24, 2**27


def linear_cross_entropy(x, w, labels, weights, *, transposed, z_loss, softcap, vocab_axis):
    """See `api.linear_cross_entropy`."""
    return _loss((transposed, z_loss, softcap, vocab_axis), x, w, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, x, w, labels, weights):
    chunks = _chunks(options, x, w, labels, weights)

    def add(total, chunk):
        loss, nll, _ = _chunk_loss(options, w, *chunk)
        return (total[0] + loss, total[1] + nll), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), chunks)[0]


def _forward(options, x, w, labels, weights):
    chunks = _chunks(options, x, w, labels, weights)
    transposed = options[0]

    def add(total, chunk):
        loss, nll, gradient = _chunk_loss(options, w, *chunk)
        d_logits = gradient().astype(x.dtype)
        dx = product(d_logits, w, b_transposed=not transposed)
        sides = (d_logits, chunk[0]) if transposed else (chunk[0], d_logits)
        dw = product(*sides, a_transposed=True)
        return (total[0] + loss, total[1] + nll, total[2] + dw), dx.astype(x.dtype)

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(w.shape, jnp.float32))
    if chunks[0].shape[0] == 1:
        (loss, nll, dw), dx = add(start, jax.tree.map(lambda c: c[0], chunks))
    else:
        (loss, nll, dw), dx = jax.lax.scan(add, start, chunks)
    return (loss, nll), (dx.reshape(-1, x.shape[1])[: x.shape[0]], dw.astype(w.dtype))


def backward(options, residuals, cotangents):
    """Of what takes its gradients in the forward pass; the last of the options is the vocabulary's axis."""
    dx, dw = residuals
    scale = cotangents[0]
    if options[-1] is not None:
        # Every device of the vocabulary axis returns the same loss and holds a share of its cotangent; dx is this
        # device's part of the sum over the vocabulary, which shard_map adds up as x is the same on all of them.
        scale = jax.lax.psum(scale, options[-1])
    return (dx * scale.astype(dx.dtype), dw * scale.astype(dw.dtype), None, None)


_loss.defvjp(_forward, backward)


def _chunks(options, x, w, labels, weights):
    """The tokens in equal chunks, [num_chunks, chunk, ...]; what is filled up has weight 0."""
    vocab = w.shape[0 if options[0] else 1]
    tokens = x.shape[0]
    elements = CPU_CHUNK if current_chip().platform == "cpu" else CHUNK
    num_chunks = -(-tokens // max(1, elements // vocab))
    size = -(-tokens // num_chunks)

    def split(a):
        a = jnp.pad(a, [(0, num_chunks * size - tokens)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(num_chunks, size, *a.shape[1:])

    return split(x), split(labels), split(weights.astype(jnp.float32))


def _chunk_loss(options, w, x, labels, weights):
    """Weighted loss and negative log-likelihood of one chunk, and a function for the gradient of its logits."""
    transposed, z_loss, softcap, vocab_axis = options
    logits = product(x, w, b_transposed=transposed)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if vocab_axis is not None:
        labels = labels - jax.lax.axis_index(vocab_axis) * logits.shape[1]
    is_label = labels[:, None] == jnp.arange(logits.shape[1])
    top = jnp.max(logits, axis=-1, keepdims=True)
    if vocab_axis is not None:
        top = jax.lax.pmax(top, vocab_axis)
    total = jnp.sum(jnp.exp(logits - top), axis=-1)
    # A gather, not a sum under a mask: a CPU would write that mask's result out, all of [M, V].
    present = (labels >= 0) & (labels < logits.shape[1])
    label_logit = jnp.take_along_axis(logits, jnp.where(present, labels, 0)[:, None], axis=-1)[:, 0]
    label_logit = jnp.where(present, label_logit, 0.0)
    if vocab_axis is not None:
        total, label_logit = jax.lax.psum((total, label_logit), vocab_axis)
    lse = jnp.log(total) + top[:, 0]
    nll = lse - label_logit

    def gradient():
        p = jnp.exp(logits - lse[:, None])
        d = p * (1.0 + 2.0 * z_loss * lse)[:, None] - is_label
        if softcap is not None:
            d = d * (1.0 - (logits / softcap) ** 2)
        return d * weights[:, None]

    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll), gradient
