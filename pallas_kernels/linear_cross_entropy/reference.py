"""The definition of the fused projection and loss: full logits, plainly; the truth in tests."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(x, w, labels, weights, *, z_loss=0.0, softcap=None):
    """See `api.linear_cross_entropy`; w is [D, V]."""
    logits = x @ w
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    lse = jax.scipy.special.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)
