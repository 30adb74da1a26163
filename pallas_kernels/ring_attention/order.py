"""The zig-zag order of a split sequence, in which every device has the same work under a causal mask.

The sequence is cut into 2 P chunks; device i of P holds chunks i and 2 P - 1 - i, an early one and a late one.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

Order = Literal["zigzag", "contiguous"]


def zigzag(x: Shaped[Array, "..."], axis: int, num_parts: int) -> Shaped[Array, "..."]:
    """The whole array, ordered so that `num_parts` equal parts of `axis` are what each device holds.

    Raises: ValueError where 2 * num_parts does not divide the axis.
    """
    chunks = _chunks(x, axis, 2 * num_parts)
    early, late = jnp.split(chunks, 2, axis=axis % x.ndim)
    pairs = jnp.stack([early, jnp.flip(late, axis % x.ndim)], axis=axis % x.ndim + 1)
    return pairs.reshape(x.shape)


def unzigzag(x: Shaped[Array, "..."], axis: int, num_parts: int) -> Shaped[Array, "..."]:
    """Undoes `zigzag`."""
    at = axis % x.ndim
    pairs = _chunks(x, axis, 2 * num_parts)
    pairs = pairs.reshape(*x.shape[:at], num_parts, 2, *pairs.shape[at + 1 :])
    early, late = (jnp.take(pairs, half, axis=at + 1) for half in (0, 1))
    return jnp.concatenate([early, jnp.flip(late, at)], axis=at).reshape(x.shape)


def _chunks(x: Array, axis: int, num_chunks: int) -> Array:
    at = axis % x.ndim
    if x.shape[at] % num_chunks:
        raise ValueError(f"axis {axis} of {x.shape} does not split into {num_chunks} chunks, two for each part")
    return x.reshape(*x.shape[:at], num_chunks, -1, *x.shape[at + 1 :])
