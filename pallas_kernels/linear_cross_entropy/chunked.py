"""What the implementations share that take gradients in the same pass as the loss, for chunks of tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Options(NamedTuple):
    """What is known when a program is compiled."""

    transposed: bool
    z_loss: float
    softcap: float | None
    vocab_axis: str | None

    def vocab(self, w: Array) -> int:
        """Its part that is here."""
        return w.shape[0 if self.transposed else 1]


class Softmax(NamedTuple):
    """Of each token, float32 [M]: the log-sum-exp of its logits, and the label's logit."""

    lse: Array
    label_logit: Array

    def joined(self, options: Options) -> "Softmax":
        """Of the whole vocabulary, where each device of an axis has a part; a label's logit is 0 where it is not."""
        if options.vocab_axis is None:
            return self
        top = lax.pmax(self.lse, options.vocab_axis)
        total, label_logit = lax.psum((jnp.exp(self.lse - top), self.label_logit), options.vocab_axis)
        return Softmax(top + jnp.log(total), label_logit)

    def sums(self, options: Options, weights: Array) -> tuple[Array, Array]:
        """(weighted loss with the z term, weighted negative log-likelihood)."""
        nll = self.lse - self.label_logit
        return jnp.sum(weights * (nll + options.z_loss * self.lse**2)), jnp.sum(weights * nll)

    def gradient(self, options: Options, weights: Array) -> tuple[Array, Array]:
        """What the softmax is multiplied by in the logits' gradient, and that gradient at the label, [M] each.

        The gradient is weight * (softmax * (1 + 2 z lse) - [label]), by the softcap's slope (of which the first has
        nothing). The label's is of its logit: one less a softmax near one, in half precision, has few digits.
        """
        of_softmax = weights * (1.0 + 2.0 * options.z_loss * self.lse)
        of_label = of_softmax * jnp.exp(self.label_logit - self.lse) - weights
        if options.softcap is not None:
            of_label = of_label * (1.0 - (self.label_logit / options.softcap) ** 2)
        return of_softmax, of_label


def labels_here(options: Options, w: Array, labels: Array) -> Array:
    """Labels as columns of the vocabulary that is here, -1 or less where they are not in it; int32."""
    labels, vocab = labels.astype(jnp.int32), options.vocab(w)
    if options.vocab_axis is not None:
        labels = labels - lax.axis_index(options.vocab_axis) * vocab
    return jnp.where(labels < vocab, labels, -1)  # nor may it be in the padding of the last block


def loss_and_gradients(size: int, gradients: Callable[..., Any], x: Array, w: Array, labels: Array, weights: Array):
    """((loss, nll), (dx, dw)): what the loss's custom derivative returns forward, its gradients for residuals.

    gradients: (x, w, labels, weights, dw) of `size` tokens -> ((loss, nll), dx, dw), where dw is the sum of earlier
    chunks, float32, and returned with this one's in it; or None if there is but one.
    """
    tokens = x.shape[0]
    if size >= tokens:
        sums, dx, dw = gradients(x, w, labels, weights, None)
        return sums, (dx, dw.astype(w.dtype))

    def add(total, chunk):
        part, dx, dw = gradients(chunk[0], w, *chunk[1:], total[2])
        return (total[0] + part[0], total[1] + part[1], dw), dx

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(w.shape, jnp.float32))
    (loss, nll, dw), dx = lax.scan(add, start, split(size, x, labels, weights))
    return (loss, nll), (dx.reshape(-1, x.shape[1])[:tokens], dw.astype(w.dtype))


def split(size: int, *arrays: Array) -> tuple[Array, ...]:
    """[M, ...] each, as [chunks, size, ...]; what the last one lacks is zeros, so that it has no weight."""

    def one(a):
        a = jnp.pad(a, [(0, -a.shape[0] % size)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(-1, size, *a.shape[1:])

    return tuple(map(one, arrays))


def backward(options: Options, residuals, cotangents):
    """Of `loss_and_gradients`: the gradients by the loss's cotangent."""
    dx, dw = residuals
    scale = cotangents[0]
    if options.vocab_axis is not None:
        # Every device of the vocabulary axis returns the same loss and holds a share of its cotangent; dx is this
        # device's part of the sum over the vocabulary, which shard_map adds up as x is the same on all of them.
        scale = lax.psum(scale, options.vocab_axis)
    return (dx * scale.astype(dx.dtype), dw * scale.astype(dw.dtype), None, None)


def even(tokens: int, most: int, multiple: int) -> int:
    """The size of as few equal chunks as may be, of at most `most` tokens each and each a multiple of some rows."""
    most = max(1, most // multiple) * multiple
    if tokens <= most:
        return tokens
    size = -(-tokens // -(-tokens // most))
    return size + -size % multiple
