"""`rotary`: the public function, its checks, and the choice of implementation."""

from jax import Array
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.later import Later
from pallas_kernels.partition import Dims, Layout
from pallas_kernels.rotary import xla

tpu = Later("pallas_kernels.rotary.tpu")

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.rotary, "tpu", tpu.refuse),
    dispatch.Implementation("xla", xla.rotary),
)
_TOKENS = Dims(("batch", "sequence", None, None))
_HEADS = Dims(("batch", "sequence", "heads", None))
LAYOUT = Layout({"x": _HEADS, "cos": _TOKENS, "sin": _TOKENS}, _HEADS)


def rotary(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T 1 H//2"],
    sin: Float[Array, "B T 1 H//2"],
    *,
    implementation: dispatch.Wanted = None,
) -> Float[Array, "B T N H"]:
    """Queries or keys with the pairs (i, i + H/2) of each head turned by their positions' angles (arXiv:2104.09864).

    That is the layout of published weights. Computed in float32, returned in x's dtype; differentiable in x alone.

    Args:
      cos, sin: of the angles, float32, the same for every head.
      implementation: "tpu" or "xla", or several in order of preference; None takes the best.

    Raises: ValueError for shapes that do not fit, or an implementation that cannot run here.
    """
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"rotary takes x [B,T,N,H] with an even H, not {x.shape}")
    table = (*x.shape[:2], 1, x.shape[3] // 2)
    if cos.shape != table or sin.shape != table:
        raise ValueError(f"rotary takes cos and sin of {table} for x {x.shape}, not {cos.shape} and {sin.shape}")
    return dispatch.call("rotary", IMPLEMENTATIONS, implementation, {"x": x, "cos": cos, "sin": sin}, LAYOUT)
