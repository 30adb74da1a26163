"""The definition of attention, as plain as it can be written; the truth in tests."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
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


def visible_pairs(num_queries: int, num_keys: int, causal: bool, window: int | None, q_offset: int | None) -> int:
    """Query-key pairs that the masks of one sequence leave; None for an offset means: the mean over all it may be."""
    if not causal:
        return num_queries * num_keys
    if q_offset is None:
        q_offset = num_keys if num_queries == 1 else max(num_keys - num_queries, 0) // 2
    stop = np.arange(num_queries) + q_offset + 1
    first = np.zeros_like(stop) if window is None else np.maximum(stop - window, 0)
    return int(np.maximum(np.minimum(stop, num_keys) - first, 0).sum())


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    sinks: Float[Array, "N"] | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    return_lse: bool = False,
    **masking,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """softmax(softcap(scale q kᵀ) + alibi + bias + mask) v, in the precision of its arguments; see `api.attention`."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    q_index = jnp.arange(q.shape[1]) + jnp.reshape(jnp.asarray(q_offset), (-1, 1))
    kv_index = jnp.arange(k.shape[1])
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (kv_index - q_index[:, :, None]).astype(scores.dtype)
        scores = scores + lax.stop_gradient(alibi_slopes)[:, None, None].astype(scores.dtype) * distance[:, None]
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    seen = mask(q_index, kv_index, **masking)[:, None]
    scores = jnp.where(seen, scores, NEG_INF)
    top = scores.max(axis=-1, keepdims=True, initial=NEG_INF)  # a bias of -inf in a whole row must give zeros too
    if sinks is not None:
        sink = sinks[:, None, None].astype(scores.dtype)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top) * seen
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    total = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bnts,bsnh->btnh", weights / total, v)
    if not return_lse:
        return out
    lse = (top + jnp.log(total))[..., 0]
    return out, lse.astype(jnp.promote_types(lse.dtype, jnp.float32))
