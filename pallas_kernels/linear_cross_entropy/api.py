"""`linear_cross_entropy`: the public function and its checks."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.linear_cross_entropy import xla


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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of softmax(x w) without ever holding the [M, V] logits; differentiable in x and w.

    Tokens are taken in chunks. Where gradients are wanted they are computed in the same pass, since the loss is a
    sum and its cotangent a scalar: three products in all instead of four.

    Args:
      x: final hidden states.
      w: output projection, [V, D] if `transposed` (a tied embedding table).
      labels: token ids in [0, V); anything where the weight is 0.
      weights: of each token in the sum (a mask, or a fraction); not differentiated.
      z_loss: adds z_loss * logsumexp(logits) ** 2 (arXiv:2204.02311) to each token's loss.
      softcap: logits become softcap * tanh(logits / softcap).
      vocab_axis: inside `shard_map`, the mesh axis over which V is split; x is then the same on all of it.

    Returns: (sum of weighted loss with the z term, sum of weighted negative log-likelihood), float32. Only the first
      carries a gradient.
    Raises: ValueError for shapes that do not fit.
    """
    features = w.shape[1 if transposed else 0]
    if x.ndim != 2 or x.shape[1] != features or labels.shape != x.shape[:1] or weights.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes x [M,D], w [D,V] (or [V,D] transposed), labels [M], weights [M], "
            f"not {x.shape}, {w.shape}, {labels.shape}, {weights.shape}"
        )
    return xla.linear_cross_entropy((transposed, float(z_loss), softcap, vocab_axis), x, w, labels, weights)
