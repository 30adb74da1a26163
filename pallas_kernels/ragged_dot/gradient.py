"""The gradients of a grouped product: two more grouped products, which every implementation brings its own of."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.tensor import QuantizedTensor


class Products(NamedTuple):
    """The two products behind `ragged_dot` and its gradients.

    rows: (x [M, K], w [E, K, N], scale, sizes, transposed) -> [M, N]; transposed takes x [M, N] and gives [M, K],
      reading the same w. scale is [E, G, N] where w is codes, otherwise None.
    weights: (x [M, K], d_out [M, N], sizes, dtype) -> xᵀ d_out of each group, [E, K, N] in dtype; zeros for an
      empty group.
    """

    rows: Callable[..., Any]
    weights: Callable[..., Any]


def ragged_dot(products: Products, x, w, group_sizes):
    """x w group by group by the products given, differentiable in x, and in w unless that is quantised."""
    sizes = group_sizes.astype(jnp.int32)
    if not isinstance(w, QuantizedTensor):
        return _ragged_dot(products, x, w, None, sizes)
    x = jnp.pad(x, ((0, 0), (0, w.padded_size - w.size)))
    return _ragged_dot(products, x, w.data, w.scales, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_dot(products, x, w, scale, sizes):
    return products.rows(x, w, scale, sizes, False)


def _backward(products, residuals, d_out):
    x, w, scale, sizes = residuals
    dx = products.rows(d_out, w, scale, sizes, True)
    dw = products.weights(x, d_out, sizes, w.dtype) if scale is None else None
    return dx, dw, None, None


_ragged_dot.defvjp(lambda products, *args: (_ragged_dot(products, *args), args), _backward)
