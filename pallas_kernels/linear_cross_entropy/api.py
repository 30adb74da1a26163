"""`linear_cross_entropy`: the public function, its checks, and the choice of implementation."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.later import Later
from pallas_kernels.linear_cross_entropy import reference, xla
from pallas_kernels.partition import Dims, Layout

tpu, gpu = Later("pallas_kernels.linear_cross_entropy.tpu"), Later("pallas_kernels.linear_cross_entropy.gpu")

IMPLEMENTATIONS = (
    dispatch.Implementation("tpu", tpu.linear_cross_entropy, "tpu", tpu.refuse),
    dispatch.Implementation("gpu", gpu.linear_cross_entropy, "gpu", gpu.refuse),
    dispatch.Implementation("xla", xla.linear_cross_entropy),
    dispatch.Implementation("reference", reference.linear_cross_entropy, refuse=reference.refuse),
)

# Tokens may be split over a mesh: the sums are added up. A split vocabulary needs `vocab_axis`.
LAYOUT = Layout(
    {"x": Dims(("tokens", None)), "w": Dims((None, None)), "labels": Dims(("tokens",)), "weights": Dims(("tokens",))},
    (Dims(()), Dims(())),
)


def linear_cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"] | Float[Array, "V D"],
    labels: Int[Array, "M"],
    weights: Float[Array, "M"],
    *,
    transposed: bool = False,
    z_loss: float = 0.0,
    softcap: float | None = None,
    vocab_axis: str | None = None,
    implementation: dispatch.Wanted = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of softmax(x w) without ever holding the [M, V] logits; differentiable in x and w.

    Where gradients are wanted they are computed in the same pass, since the loss is a sum and its cotangent a scalar:
    three products in all, for chunks of tokens. "xla" holds the logits of a chunk. The kernels of "tpu" and "gpu" leave
    none for the loss alone, and for gradients the exponentials of a chunk in x's type. "reference" holds all logits.

    Args:
      x: final hidden states.
      w: output projection, [V, D] if `transposed` (a tied embedding table).
      labels: token ids in [0, V); anything where the weight is 0.
      weights: of each token in the sum (a mask, or a fraction); not differentiated.
      z_loss: adds z_loss * logsumexp(logits) ** 2 (arXiv:2204.02311) to each token's loss.
      softcap: logits become softcap * tanh(logits / softcap).
      vocab_axis: inside `shard_map`, the mesh axis over which V is split; x is then the same on all of it.
      implementation: "tpu", "gpu", "xla" or "reference", or several in order of preference; None takes the best.

    Returns: (sum of weighted loss with the z term, sum of weighted negative log-likelihood), float32. Only the first
      carries a gradient.
    Raises: ValueError for shapes that do not fit, or an implementation that cannot run here.
    """
    features = w.shape[1 if transposed else 0]
    if x.ndim != 2 or x.shape[1] != features or labels.shape != x.shape[:1] or weights.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes x [M,D], w [D,V] (or [V,D] transposed), labels [M], weights [M], "
            f"not {x.shape}, {w.shape}, {labels.shape}, {weights.shape}"
        )
    options = {"transposed": transposed, "z_loss": float(z_loss), "softcap": softcap, "vocab_axis": vocab_axis}
    arguments = {"x": x, "w": w, "labels": labels, "weights": weights, **options}
    return dispatch.call("linear_cross_entropy", IMPLEMENTATIONS, implementation, arguments, LAYOUT)
