"""The definition of attention, as plain as it can be written; the truth in tests."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

NEG_INF = -1e30  # not -inf: a row without any key must give zeros, not nan


def mask(
    q_index: Int[Array, "#B T"],
    kv_index: Int[Array, "S"],
    *,
    causal: bool = True,
    window: int | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "#B T S"]:
    """Which key a query sees, by where both stand in the sequence of keys."""
    distance = q_index[:, :, None] - kv_index
    seen = jnp.ones_like(distance, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    if q_segment_ids is not None and kv_segment_ids is not None:
        seen &= q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return seen


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    **masking,
) -> Float[Array, "B T N H"]:
    """softmax(softcap(scale q kᵀ) + mask) v, in the precision of its arguments; see `api.attention`."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    q_index = jnp.arange(q.shape[1]) + jnp.reshape(jnp.asarray(q_offset), (-1, 1))
    seen = mask(q_index, jnp.arange(k.shape[1]), **masking)[:, None]
    scores = jnp.where(seen, scores, NEG_INF)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * seen
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0, 1, total), v)
