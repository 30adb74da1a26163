"""Attention over a split sequence as its definition: every device gathers the whole one."""

import jax
from jax import Array, lax

from pallas_kernels.attention import reference
from pallas_kernels.ring_attention.order import unzigzag, zigzag


def ring_attention(q, k, v, *, axis_name, order, segment_ids, return_lse, **options) -> Array | tuple[Array, Array]:
    """See `api.ring_attention`."""
    parts = lax.axis_size(axis_name)

    def gather(x: Array) -> Array:
        whole = lax.all_gather(x, axis_name, axis=1, tiled=True)
        return unzigzag(whole, 1, parts) if order == "zigzag" else whole

    def own(x: Array, axis: int) -> Array:
        ordered = zigzag(x, axis, parts) if order == "zigzag" else x
        size = x.shape[axis] // parts
        return lax.dynamic_slice_in_dim(ordered, lax.axis_index(axis_name) * size, size, axis)

    q, k, v, ids = jax.tree.map(gather, (q, k, v, segment_ids))
    out, lse = reference.attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, return_lse=True, **options)
    return (own(out, 1), own(lse, 2)) if return_lse else own(out, 1)
