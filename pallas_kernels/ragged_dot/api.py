"""`ragged_dot`: the public function and its checks."""

import jax
from jax import Array
from jaxtyping import Float, Int


def ragged_dot(x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, "E"]) -> Float[Array, "M N"]:
    """The first group_sizes[0] rows of x times w[0], the next group_sizes[1] rows times w[1], and so on.

    Rows past the last group give zeros. Differentiable in x and w; group sizes are known only at run time.

    Raises: ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"ragged_dot takes x [M,K], w [E,K,N], sizes [E], not {x.shape}, {w.shape}, {group_sizes.shape}"
        )
    return jax.lax.ragged_dot(x, w, group_sizes.astype("int32"))
