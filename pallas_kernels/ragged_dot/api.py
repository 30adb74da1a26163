"""`ragged_dot`: the public function, its checks, and the choice of implementation."""

import dataclasses

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.later import Later
from pallas_kernels.partition import Dims, Layout
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor
from pallas_kernels.ragged_dot import reference, xla

tpu, gpu = Later("pallas_kernels.ragged_dot.tpu"), Later("pallas_kernels.ragged_dot.gpu")

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.ragged_dot, "tpu", tpu.refuse),
    dispatch.Implementation("gpu", gpu.ragged_dot, "gpu", gpu.refuse),
    dispatch.Implementation("xla", xla.ragged_dot),
    dispatch.Implementation("reference", reference.ragged_dot),
)


def ragged_dot(
    x: Float[Array, "M K"],
    w: Float[Array, "E K N"] | QuantizedTensor,
    group_sizes: Int[Array, "E"],
    *,
    implementation: dispatch.Wanted = None,
) -> Float[Array, "M N"]:
    """The first group_sizes[0] rows of x times w[0], the next group_sizes[1] rows times w[1], and so on.

    The products of a mixture of experts whose tokens are sorted by expert (arXiv:2211.15841). Work goes with M, not
    with M times E. Rows past the last group give zeros and no gradient. Differentiable in x, and in w where it is an
    array; group sizes are known only at run time.

    Args:
      x: rows, sorted by group.
      w: a matrix for each group, or a QuantizedTensor of that shape, symmetric in 8 bits with scales along K: codes
        are widened to x's dtype where they are multiplied, never all of them at once.
      group_sizes: rows of each group; their sum is at most M.
      implementation: "tpu", "gpu", "xla" or "reference", or several in order of preference; None takes the best.

    Returns: [M, N] in x's dtype, summed in float32.
    Raises: ValueError for shapes that do not fit, or an implementation that cannot run here.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"ragged_dot takes x [M,K], w [E,K,N], sizes [E], not {x.shape}, {w.shape}, {group_sizes.shape}"
        )
    if isinstance(w, QuantizedTensor) and (w.bits, w.axis, w.zeros) != (8, -2, None):
        kind = f"bits={w.bits}, axis={w.axis} and {'no ' if w.zeros is None else ''}zero points"
        raise ValueError(f"ragged_dot takes quantised w with bits=8, axis=-2 and no zero points, not {kind}")
    arguments = {"x": x, "w": w, "group_sizes": group_sizes}
    columns = Dims((None, None, "columns"))  # rows are of any group, so they stay together
    of_w = dataclasses.replace(w, data=columns, scales=columns) if isinstance(w, QuantizedTensor) else columns
    layout = Layout({"x": Dims((None, None)), "w": of_w, "group_sizes": Dims((None,))}, Dims((None, "columns")))
    return dispatch.call("ragged_dot", IMPLEMENTATIONS, implementation, arguments, layout)
