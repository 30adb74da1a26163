"""The definition of the grouped matrix product; the truth in tests."""

import jax.numpy as jnp


def ragged_dot(x, w, group_sizes):
    """See `api.ragged_dot`."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    member = (rows < ends) & (rows >= ends - group_sizes)
    return jnp.einsum("me,mk,ekn->mn", member.astype(x.dtype), x, w)
