"""The grouped product in plain XLA.

On a CPU XLA multiplies every row by every group's matrix. So there the groups are walked in blocks of rows: a loop of
as many steps as the blocks that the groups fill. Elsewhere XLA has a grouped product of its own.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cpu import product
from pallas_kernels.ragged_dot import gradient

MIN_BLOCK, MAX_BLOCK = 8, 256  # rows: fewer than two are slow in bfloat16; more only fill up with what is not wanted


def ragged_dot(x, w, group_sizes):
    """See `api.ragged_dot`."""
    return gradient.ragged_dot(PRODUCTS, x, w, group_sizes)


def rows(x, w, scale, sizes, transposed):
    """See `gradient.Products`."""
    arguments = (x, w, sizes) if scale is None else (x, w, sizes, scale)
    cpu = functools.partial(_walk_rows, transposed=transposed)
    return lax.platform_dependent(*arguments, cpu=cpu, default=functools.partial(_native_rows, transposed=transposed))


def weights(x, d_out, sizes, dtype):
    """See `gradient.Products`."""
    cpu = functools.partial(_walk_weights, dtype=dtype)
    return lax.platform_dependent(x, d_out, sizes, cpu=cpu, default=functools.partial(_native_weights, dtype=dtype))


PRODUCTS = gradient.Products(rows, weights)


def _native_rows(x, w, sizes, scale=None, *, transposed):
    w = _widened(w, scale, x.dtype)
    out = lax.ragged_dot(x, w.mT if transposed else w, sizes)
    member = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(member[:, None], out, 0)


def _native_weights(x, d_out, sizes, *, dtype):
    grouped_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return lax.ragged_dot_general(x, d_out, sizes, grouped_rows).astype(dtype)


def _walk_rows(x, w, sizes, scale=None, *, transposed):
    """Blocks of rows in order. What a block writes past its group's end the next group writes again."""
    size, num_rows = _block(x.shape[0], w.shape[0]), x.shape[0]
    starts, blocks = jnp.cumsum(sizes) - sizes, -(-sizes // size)
    block_ends = jnp.cumsum(blocks)
    x = jnp.pad(x, ((0, size), (0, 0)))

    def step(i, out):
        group = jnp.searchsorted(block_ends, i, side="right")
        at = starts[group] + (i - (block_ends - blocks)[group]) * size
        matrix = _matrix(w, scale, group, x.dtype)
        part = product(lax.dynamic_slice_in_dim(x, at, size), matrix, b_transposed=transposed)
        return lax.dynamic_update_slice_in_dim(out, part.astype(x.dtype), at, 0)

    out = jnp.zeros((num_rows + size, w.shape[1 if transposed else 2]), x.dtype)
    out = lax.fori_loop(0, block_ends[-1], step, out)[:num_rows]
    return jnp.where((jnp.arange(num_rows) < jnp.sum(sizes))[:, None], out, 0)


def _walk_weights(x, d_out, sizes, *, dtype):
    size = _block(x.shape[0], sizes.shape[0])
    x, d_out = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, d_out))

    def group(start, rows_of_group):
        def step(i, total):
            at = start + i * size
            member = jnp.arange(size) < rows_of_group - i * size
            parts = (jnp.where(member[:, None], lax.dynamic_slice_in_dim(a, at, size), 0) for a in (x, d_out))
            return total + product(*parts, a_transposed=True)

        total = jnp.zeros((x.shape[1], d_out.shape[1]), jnp.promote_types(x.dtype, jnp.float32))
        return start + rows_of_group, lax.fori_loop(0, -(-rows_of_group // size), step, total).astype(dtype)

    return lax.scan(group, jnp.zeros((), sizes.dtype), sizes)[1]


def _matrix(w, scale, group, dtype) -> Array:
    pick = functools.partial(lax.dynamic_slice_in_dim, start_index=group, slice_size=1)
    return _widened(pick(w), None if scale is None else pick(scale), dtype)[0]


def _block(num_rows: int, num_groups: int) -> int:
    """About the rows of a group, so that little is multiplied in vain and no matrix is read many times."""
    average = -(-num_rows // num_groups)
    return min(max(MIN_BLOCK, 1 << (average - 1).bit_length()), MAX_BLOCK)


def _widened(w, scale, dtype) -> Array:
    """The weights [E, K, N] that 8-bit codes and their scales [E, G, N] stand for; w itself without scales."""
    if scale is None:
        return w
    groups = w.reshape(*scale.shape[:2], -1, scale.shape[2]).astype(jnp.float32)
    return (groups * scale[:, :, None]).reshape(w.shape).astype(dtype)
