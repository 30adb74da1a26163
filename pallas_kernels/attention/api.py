"""`attention`: the public function, its checks, and the choice of implementation."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.attention import reference, xla

IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    window: int | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention (arXiv:2305.13245), differentiable in q, k and v.

    Args:
      q, k, v: queries and keys/values; N is a multiple of K. Scores and softmax are computed in float32.
      causal: a query sees no key after it.
      window: a query sees itself and at most the `window - 1` keys before it.
      q_offset: index of the first query among the keys, one for all or one a sequence. A Python int lets blocks
        that the mask empties be left out of the program.
      q_segment_ids, kv_segment_ids: a query sees only keys of its own segment.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118).
      scale: of the scores; H ** -0.5 if None.
      implementation: "xla" or "reference"; None takes the best for the platform.

    Returns: [B, T, N, H] in q's dtype; zeros for a query that sees no key.
    Raises: ValueError for shapes that do not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention takes q [B,T,N,H] and k, v [B,S,K,H], not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head_dim")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"num_heads={q.shape[2]} is not a multiple of num_kv_heads={k.shape[2]}")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("give both q_segment_ids and kv_segment_ids, or neither")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is not known; use one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](
        q,
        k,
        v,
        causal=causal,
        window=window,
        q_offset=q_offset,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        softcap=softcap,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
