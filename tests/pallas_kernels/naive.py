"""Attention and its gradients in numpy and float64, written from the formulas and from nothing in the packages."""

import numpy as np


def sees(num_queries, num_keys, *, causal, window, offset, q_ids=None, kv_ids=None) -> np.ndarray:
    """Which key each query sees, [B, T, S], by asking one pair at a time. offset: of each sequence."""
    seen = np.zeros((len(offset), num_queries, num_keys), bool)
    for b, t, s in np.ndindex(seen.shape):
        at = t + offset[b]
        seen[b, t, s] = not (
            (causal and s > at)
            or (window is not None and at - s >= window)
            or (q_ids is not None and q_ids[b, t] != kv_ids[b, s])
        )
    return seen


def attention(q, k, v, d_out, seen, *, scale, softcap=None):
    """(out, dq, dk, dv) for q, d_out [B, T, N, H], k, v [B, S, K, H] and seen [B, T, S]; d_out is out's cotangent."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        keys, values, visible = k[b, :, n // group], v[b, :, n // group], seen[b]
        scores = q[b, :, n] @ keys.T * scale
        slope = np.ones_like(scores)
        if softcap is not None:
            squashed = np.tanh(scores / softcap)
            scores, slope = softcap * squashed, 1 - squashed**2
        p = np.where(visible, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
        dp = d_out[b, :, n] @ values.T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * slope * scale
        out[b, :, n] = p @ values
        dq[b, :, n] = ds @ keys
        dk[b, :, n // group] += ds.T @ q[b, :, n]
        dv[b, :, n // group] += p.T @ d_out[b, :, n]
    return out, dq, dk, dv
