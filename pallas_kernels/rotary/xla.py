"""Rotary position embeddings in plain XLA."""

import jax.numpy as jnp


def rotary(x, cos, sin):
    """See `api.rotary`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
